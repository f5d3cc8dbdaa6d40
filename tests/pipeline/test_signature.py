from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxopt import api
from onnxopt.errors import LimitError, UsageError
from onnxopt.pipeline.signature import SignatureChange, parse_shapes
from onnxopt.report import Verdict
from onnxopt.runtime import Probe
from tests.pipeline.builders import CLASSES, HIDDEN, SIZE, bad, write_example


def dims(info: onnx.ValueInfoProto) -> list[Any]:
    return [dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim]


def test_texts_of_shapes() -> None:
    assert parse_shapes("x:1,3,-1,w") == {"x": (1, 3, None, "w")}
    assert parse_shapes(["in:0:1, 2", "s:", "b:[N,?]"]) == {"in:0": (1, 2), "s": (), "b": ("N", None)}
    assert parse_shapes({"x": (1, -1, "n", None)}) == {"x": (1, None, "n", None)}
    assert not SignatureChange.of(None, None, ())


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("1,3", "names no input"),
        (":1,3", "names no input"),
        ("x:1,,3", "'' is no length"),
        ("x:0", "0 is out of range"),
        ("x:-2", "-2 is out of range"),
        ("x:99999999999999999999", "out of range"),
        (["x:1", "x:2"], "given twice"),
        ({"x": (1.5,)}, "1.5 is no length"),
    ],
)
def test_what_is_no_shape(text: Any, cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        parse_shapes(text)


def test_the_changed_model_is_the_reference(tmp_path: Path) -> None:
    model, data = write_example(tmp_path)
    out = tmp_path / "out.onnx"
    result = api.optimize(
        model, bad("DropIdentity"), data, inputs="x", outputs="r", output=out, latency_seconds=0, samples=4
    )
    assert result.report.verdict is Verdict.PASSED
    assert result.report.reference_changes == ("the part from x to r",)
    assert result.report.reference.nodes == 3
    assert result.report.reference.file_bytes < model.stat().st_size
    assert result.report.reference.path == str(model)
    assert result.report.comparison is not None
    assert [output.name for output in result.report.comparison.outputs] == ["r"]
    assert "original: the part from x to r" in result.report.to_text()
    assert dims(onnx.load(out).graph.output[0]) == ["batch", HIDDEN]
    assert type(result.report).from_json(result.report.to_json()) == result.report


def test_shapes_alone_need_no_pass_and_feeds_must_fit(tmp_path: Path) -> None:
    model, data = write_example(tmp_path)
    out = tmp_path / "out.onnx"
    result = api.optimize(model, feeds=data, input_shapes=f"x:1,{SIZE}", output=out, latency_seconds=0)
    assert (result.report.verdict, result.report.reason) == (Verdict.UNCHANGED, "there are no passes")
    assert result.report.reference_changes == (f"input x: [batch,{SIZE}] -> [1,{SIZE}]",)
    saved = onnx.load(out)
    assert (dims(saved.graph.input[0]), dims(saved.graph.output[0])) == ([1, SIZE], [1, CLASSES])
    np.savez(tmp_path / "two.npz", x=np.zeros((1, 2, SIZE), np.float32))
    with pytest.raises(UsageError, match="'x'"):
        api.optimize(model, feeds=tmp_path / "two.npz", input_shapes=f"x:1,{SIZE}")


def test_feeds_beside_the_model_are_used_where_they_fit(tmp_path: Path) -> None:
    model, data = write_example(tmp_path)
    data.rename(tmp_path / "net.feeds.npz")
    fitting = api.optimize(model, input_shapes=f"x:1,{SIZE}", latency_seconds=0).report
    assert fitting.feeds is not None
    assert not fitting.feeds.synthetic
    other = api.optimize(model, inputs="h", latency_seconds=0).report
    assert other.feeds is not None
    assert other.feeds.synthetic
    assert "what lies beside the model does not fit the changed inputs" in other.feeds.note


def test_a_shape_that_only_a_run_refutes_is_a_usage_error(tmp_path: Path) -> None:
    source = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        agraph (float[N,3,8,8] x, float[4,3,1,1] w) => (float[N,4,8,8] y) { y = Conv(x, w) }""")
    with pytest.raises(UsageError, match="can't be run") as caught:
        api.optimize(source, input_shapes="x:1,5,8,8", latency_seconds=0)
    assert "give dims that the graph can compute with" in caught.value.remedy


def test_opset_is_raised_first_and_proven(tmp_path: Path) -> None:
    text = '<ir_version: 7, opset_import: ["" : 12]> agraph (float[2,3] x) => (float[2,3] y) { y = Softmax<axis=1>(x) }'
    source = onnx.parser.parse_model(text)
    result = api.optimize(source, "dedup", opset=17, latency_seconds=0)
    assert result.model.opset == 17
    assert [record.name for record in result.report.passes] == ["convert_opset", "dedup"]
    assert result.report.passes[0].comparison is not None
    assert not result.report.reference_changes
    assert api.optimize(source, opset=13, latency_seconds=0).model.opset == 13
    newer = onnx.parser.parse_model(text.replace("12", "18"))
    with pytest.raises(UsageError, match="uses operator set 18, and it is only raised") as caught:
        api.optimize(newer, opset=17)
    assert "18 or more" in caught.value.remedy
    with pytest.raises(UsageError, match="out of range"):
        api.optimize(source, opset=99)


def test_a_model_is_met_apart_before_shapes_are_inferred_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, _ = write_example(tmp_path)
    met: list[str] = []

    class Refusing(Probe):
        def __enter__(self) -> Refusing:
            met.append(self.name)
            raise LimitError("too slow", "leave it")

    monkeypatch.setattr(api, "Probe", Refusing)
    monkeypatch.setattr(SignatureChange, "apply", lambda *_: pytest.fail("inferred before"))
    for call in (lambda: api.optimize(model, input_shapes="x:1,12"), lambda: api.inspect(model)):
        with pytest.raises(LimitError, match="too slow"):
            call()
    assert met == [str(model)] * 2


def test_without_passes_and_changes_there_is_nothing_to_do(tmp_path: Path) -> None:
    model, _ = write_example(tmp_path)
    with pytest.raises(UsageError, match="the pass list is empty"):
        api.optimize(model)
