"""The models of onnx's backend tests, those of one node and those that frameworks exported, each with its inputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test
from onnx import ModelProto, OptionalProto, SequenceProto, TensorProto, numpy_helper

from tests.helpers import random_feeds


@dataclass(frozen=True)
class Case:
    """A model and inputs by name; `inputs` is None where they can't be had, `golden` (outputs in order) likewise."""

    name: str
    model: ModelProto
    inputs: dict[str, Any] | None
    golden: tuple[Any, ...] | None = None


@cache
def cases() -> tuple[Case, ...]:
    """All of them, in a fixed order: generated ones by name, then files by path."""
    return (*_generated(), *_files())


def frozen(case: Case) -> Case | None:
    """The same model with its tensor inputs as initializers, so that everything in it is constant."""
    infos = {info.name: info for info in case.model.graph.input}
    if not case.inputs or any(info.type.WhichOneof("value") != "tensor_type" for info in infos.values()):
        return None
    if any(isinstance(value, list) or value is None for value in case.inputs.values()):
        return None
    model = ModelProto()
    model.CopyFrom(case.model)
    model.ClearField("graph")
    model.graph.CopyFrom(case.model.graph)
    model.graph.ClearField("input")
    model.ir_version = max(model.ir_version, 4)
    given = {tensor.name for tensor in model.graph.initializer}
    for name, value in case.inputs.items():
        if name not in given:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return Case(f"{case.name} (frozen)", model, {}, case.golden)


def _generated() -> Iterator[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        found = collect_testcases(None)
    for case in sorted(found, key=lambda case: str(case.name)):
        sets = case.data_sets or []
        names = [info.name for info in case.model.graph.input]
        inputs = {name: _plain(value) for name, value in zip(names, sets[0][0], strict=False)} if sets else None
        golden = tuple(_plain(value) for value in sets[0][1]) if sets else None
        yield Case(case.name, case.model, inputs, golden)


def _plain(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else value


def _files() -> Iterator[Case]:
    folder = Path(onnx.backend.test.__file__).parent / "data"
    for path in sorted(folder.rglob("*.onnx")):
        model = onnx.load(path)
        data, results = (_data(path.parent / "test_data_set_0", kind) for kind in ("input", "output"))
        inputs: dict[str, Any] | None
        golden: tuple[Any, ...] | None = None
        if path.parent.name == "light":
            inputs = random_feeds(model)
        else:
            inputs = {
                info.name: _value(file, info) for info, file in zip(model.graph.input, data, strict=False)
            } or None
            golden = tuple(_value(file, info) for info, file in zip(model.graph.output, results, strict=False)) or None
        yield Case(f"{path.parent.parent.name}/{path.parent.name}/{path.stem}", model, inputs, golden)


def _data(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"{kind}_*.pb"), key=lambda path: int(path.stem.split("_")[1]))


def _value(path: Path, info: Any) -> Any:
    kinds = {"sequence_type": (SequenceProto, numpy_helper.to_list), "optional_type": (OptionalProto, _optional)}
    proto_class, read = kinds.get(info.type.WhichOneof("value"), (TensorProto, numpy_helper.to_array))
    proto = proto_class()
    proto.ParseFromString(path.read_bytes())
    return read(proto)


def _optional(proto: OptionalProto) -> Any:
    return numpy_helper.to_optional(proto)
