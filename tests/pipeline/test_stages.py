from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, parser

from onnxopt.errors import FeedError, ModelError, PassError
from onnxopt.feeds import Feeds, open_feeds
from onnxopt.graph import infer
from onnxopt.model import Model, load
from onnxopt.passbase import Context
from onnxopt.pipeline.grammar import Step
from onnxopt.pipeline.stages import STAGE_FEEDS, Stages, narrowest_float
from onnxopt.runtime import Session
from tests.pipeline.breaking_passes import WrongRounding
from tests.pipeline.builders import classifier


def feeds_of(path: Path, model: Model) -> Feeds:
    return open_feeds([path], Session(model).inputs).fit


def scaled(factor: float) -> tuple[Model, Step]:
    """The classifier with one weight scaled, as a pass that claims to only round leaves it."""
    model = load(classifier())
    pass_ = WrongRounding(factor=factor)
    pass_.run(model, Context())
    return model, Step(pass_, "wrong_rounding")


def test_what_the_runtime_itself_loses_widens_the_rounding_tolerance(example: tuple[Path, Path]) -> None:
    original = load(example[0])
    stages = Stages(original, feeds_of(example[1], original))
    assert set(stages.noise) == {"logits"}
    assert stages.noise["logits"] < 1e-6
    with pytest.raises(PassError, match="promised rounding"):
        stages.prove(*scaled(1.00005))
    stages.__dict__["noise"] = {"logits": 1e-4}
    figures = stages.prove(*scaled(1.00005))
    assert figures.outputs[0].max_rel is not None
    assert 1e-5 < figures.outputs[0].max_rel < 1e-4


def test_a_few_feeds_are_enough(example: tuple[Path, Path]) -> None:
    original = load(example[0])
    feeds = feeds_of(example[1], original)
    assert len(feeds) > STAGE_FEEDS
    assert len(Stages(original, feeds).reference) == STAGE_FEEDS


def test_an_original_that_fails_on_the_inputs_is_not_the_passes_fault() -> None:
    model = load(
        parser.parse_model(
            """
            <ir_version: 8, opset_import: ["" : 17]>
            net (float[N, 4] x, int64[1] at) => (float[M, 4] y) { y = Gather <axis = 0> (x, at) }
            """
        )
    )
    items = [{"x": np.zeros((2, 4), np.float32), "at": np.array([9])}]
    with pytest.raises(FeedError, match="the original fails on these inputs"):
        Stages(model, open_feeds([items], Session(model).inputs).fit)


def test_an_original_that_onnxruntime_can_not_load_is_refused(example: tuple[Path, Path]) -> None:
    model = load(example[0])
    feeds = feeds_of(example[1], model)
    model.graph.nodes[2].op = "Reluu"
    with pytest.raises(ModelError, match="can't load"):
        Stages(model, feeds)


def test_an_original_that_the_checker_refuses_is_told_and_its_passes_are_not_held_to_it(
    example: tuple[Path, Path],
) -> None:
    proto = classifier()
    # onnxruntime does not mind two metadata entries of one name; the checker does
    for value in ("1", "2"):
        entry = proto.metadata_props.add()
        entry.key, entry.value = "twice", value
    original = load(proto)
    stages = Stages(original, feeds_of(example[1], original))
    assert len(stages.warnings) == 1
    assert "does not pass onnx's checker" in stages.warnings[0]
    model, step = scaled(1.0000001)
    for value in ("1", "2"):
        entry = model.carrier.metadata_props.add()
        entry.key, entry.value = "twice", value
    stages.prove(model, step)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(TensorProto.FLOAT, None), (TensorProto.FLOAT16, "float16"), (TensorProto.BFLOAT16, "bfloat16")],
)
def test_narrowest_float(kind: int, expected: str | None) -> None:
    text = f"""
    <ir_version: 10, opset_import: ["" : 21]>
    net (float[N, 4] x) => (float[N, 4] y) {{
      narrow = Cast <to = {kind}> (x)
      y = Cast <to = 1> (narrow)
    }}
    """
    model = load(parser.parse_model(text))
    infer(model)
    assert narrowest_float(model) == expected
