"""Sessions and feeds for the tests of comparisons: the outputs are the inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxopt.feeds import Feeds
from onnxopt.feeds.function import Items
from onnxopt.runtime import Port, Session
from onnxopt.verification import Comparer, Comparison, OutputComparison, RecordedOutputs
from tests.runtime.builders import build_bytes


def identity(shape: str = "[N,C]", dtype: str = "float") -> Session:
    return Session(build_bytes(f"f ({dtype}{shape} x) => ({dtype}{shape} y) {{ y = Identity(x) }}"))


def record(values: list[Any], labels: list[Any] | None = None) -> RecordedOutputs:
    """Outputs `y` with these values, one a feed, and labels."""
    items = [{"x": value} for value in values]
    if labels is not None:
        items = [{**item, "labels": np.asarray(label)} for item, label in zip(items, labels, strict=True)]
    array = np.asarray(values[0])
    port = Port("x", array.dtype, (None,) * array.ndim)
    dims = "[" + ",".join(f"D{axis}" for axis in range(array.ndim)) + "]"
    names = {"float32": "float", "int64": "int64", "float16": "float16"}
    return RecordedOutputs(identity(dims, names[array.dtype.name]), Feeds(Items(items, "feed"), [port]))


def compare_values(reference: list[Any], candidate: list[Any]) -> Comparison:
    """The comparison of one output `y` whose values of each feed are given."""
    comparer = Comparer(["y"], ["y"])
    for index, (ours, theirs) in enumerate(zip(reference, candidate, strict=True)):
        comparer.add({"y": ours}, {"y": theirs}, f"feed[{index}]")
    return comparer.result()


def compare_one(reference: list[Any], candidate: list[Any]) -> OutputComparison:
    return compare_values(reference, candidate).outputs["y"]


def random_outputs(count: int = 8, shape: tuple[int, ...] = (1, 10), seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(count)]
