from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxopt import api, rewrite
from onnxopt.errors import NothingCompared, OnnxoptError, PassError, UsageError
from onnxopt.model import Graph
from onnxopt.pipeline import VerdictError
from onnxopt.report import Report, Status, Verdict
from tests.pipeline.breaking_passes import DropIdentity, Round, SeeStatistics, Shuffle, WrongValues
from tests.pipeline.builders import Example, bad, classifier, run


def bits(path: Path) -> bytes:
    return path.read_bytes()


def test_a_run_from_file_to_file(example: Example) -> None:
    model, _ = example
    before = bits(model)
    output = model.with_name("small.onnx")
    result = run(example, [DropIdentity(), Round(step=0.05)], output=output, latency_seconds=0.05)
    report = result.report
    assert result.path == output
    assert bits(model) == before
    assert [node.op_type for node in onnx.load(output).graph.node] == ["MatMul", "Relu", "MatMul"]
    assert report.verdict is Verdict.PASSED
    assert report.exit_code == 0
    assert [record.status for record in report.passes] == [Status.CHANGED, Status.CHANGED]
    assert report.candidate is not None
    assert report.candidate.path == str(output)
    assert report.candidate.file_bytes == output.stat().st_size
    assert report.candidate.nodes == 3
    assert report.comparison is not None
    assert report.comparison.samples == 6
    sqnr = report.comparison.outputs[0].sqnr_db
    assert sqnr is not None
    assert 20 < sqnr < 60
    assert report.metrics[0].name == "top1"
    assert report.metrics[0].reference == 1
    assert report.latency is not None
    assert report.latency.low <= report.latency.ratio <= report.latency.high


def test_each_pass_is_compared_with_the_right_stage(example: Example) -> None:
    report = run(example, [Round(step=0.05), DropIdentity(), Shuffle()]).report
    lossy, exact, rounding = (record.comparison for record in report.passes)
    assert lossy is not None
    assert exact is not None
    assert rounding is not None
    assert (lossy.against, lossy.rule) == ("the original", "quality floor 3 dB")
    assert (exact.against, exact.rule) == ("the stage before", "every bit equal")
    assert exact.outputs[0].differing == 0
    assert lossy.outputs[0].differing > 0
    assert rounding.outputs[0].max_rel is not None
    assert rounding.outputs[0].max_rel <= 1e-5


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("WrongValues", "promised exact results and broke it: output 'logits'"),
        ("WrongRounding", "promised rounding results and broke it: output 'logits'"),
        ("Ruin", "fell below the quality floor: output 'logits': SQNR"),
        ("Unloadable", "can't be loaded"),
        ("Invalid", "left an invalid model"),
        ("Rename", "changed the model's signature: output 'logits' became 'logits_1'"),
        ("Raise", "failed: RuntimeError: halfway through"),
        ("ReturnNothing", "returned NoneType"),
        ("Leave", "failed: SystemExit: 0"),
    ],
)
def test_a_pass_that_breaks_the_model_is_caught_named_and_rolled_back(example: Example, name: str, cause: str) -> None:
    model, _ = example
    output = model.with_name("small.onnx")
    with pytest.raises(PassError) as caught:
        run(example, f"{bad(name)},{bad('DropIdentity')}", output=output)
    assert caught.value.cause.startswith(f"pass '{bad(name)}'")
    assert cause in caught.value.cause
    assert caught.value.exit_code == 4
    assert not output.exists()

    result = run(example, f"{bad(name)},{bad('DropIdentity')}", output=output, on_error="skip")
    broken, good = result.report.passes
    assert broken.status is Status.FAILED
    assert broken.changes == ()
    assert broken.error is not None
    assert cause in broken.error.cause
    assert good.status is Status.CHANGED
    assert result.report.verdict is Verdict.PASSED
    assert any("left out" in warning for warning in result.report.warnings)
    session_outputs = api.compare(model, output, feeds=example[1])
    assert session_outputs.bit_equal


def test_with_nothing_verified_a_wrong_pass_gets_through_and_the_report_says_so(example: Example) -> None:
    result = run(example, bad("WrongValues"), verify=False)
    assert result.report.verdict is Verdict.NOT_VERIFIED
    assert result.report.comparison is None
    assert any("unproven" in warning for warning in result.report.warnings)


def test_unchanged_is_said_and_the_file_is_written(example: Example) -> None:
    model, _ = example
    output = model.with_name("same.onnx")
    report = run(example, SeeStatistics(), output=output).report
    assert report.verdict is Verdict.UNCHANGED
    assert report.exit_code == 0
    assert report.comparison is None
    assert report.passes[0].comparison is None
    assert onnx.load(output) == onnx.load(model)


def test_unchanged_because_all_passes_failed_is_told_as_that(example: Example) -> None:
    report = run(example, bad("Raise"), on_error="skip").report
    assert report.verdict is Verdict.UNCHANGED
    assert report.reason == "raise failed and was left out"


def test_statistics_come_from_the_fit_part_only(example: Example) -> None:
    notes = run(example, SeeStatistics()).report.passes[0].notes
    assert notes == (f"{18 * 40} values",)


def test_synthetic_inputs_give_no_statistics_and_a_weaker_verdict(example: Example) -> None:
    result = run(example, [SeeStatistics(), DropIdentity()], feeds=None)
    assert result.report.passes[0].notes == ("no statistics",)
    assert result.report.verdict is Verdict.SYNTHETIC
    assert result.report.exit_code == 0
    assert result.report.feeds is not None
    assert result.report.feeds.synthetic
    with pytest.raises(NothingCompared) as caught:
        run(example, DropIdentity(), feeds=None, require_data=True)
    assert caught.value.exit_code == 5


def test_feeds_beside_the_model_are_found(example: Example) -> None:
    model, data = example
    data.rename(model.with_name("net.feeds.npz"))
    report = run(example, DropIdentity(), feeds=None).report
    assert report.verdict is Verdict.PASSED
    assert report.feeds is not None
    assert "net.feeds.npz" in report.feeds.note


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"max_latency": "1x"}, "timing is off"),
        ({"max_drop": "top1=1pt", "verify": False}, "nothing is compared"),
        ({"max_drop": "topp1=1pt"}, "unknown metric"),
        ({"max_sise": "1MB"}, "unknown budget 'max_sise'"),
        ({"metrics": "topp1"}, "unknown metric"),
        ({"target": "x87"}, "unknown target 'x87'"),
        ({"on_error": "ignore"}, "'ignore' is not among its values"),
        ({"reports": "run.pdf"}, "report can't be written"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(example: Example, settings: dict[str, Any], cause: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(example, bad("Raise"), **settings)
    assert cause in caught.value.cause


def test_a_rounding_pass_after_quantization_is_refused(example: Example) -> None:
    with pytest.raises(UsageError) as caught:
        run(example, f"{bad('QuantizeInput')},{bad('Shuffle')}")
    assert "re-orders float arithmetic" in caught.value.cause
    assert "before the quantizing pass" in caught.value.remedy
    assert caught.value.exit_code == 2
    report = run(example, f"{bad('Shuffle')},{bad('QuantizeInput')},{bad('DropIdentity')}").report
    assert [record.status for record in report.passes] == [Status.CHANGED] * 3


def test_a_model_that_came_quantized_takes_rounding_passes(tmp_path: Path, example: Example) -> None:
    quantized = tmp_path / "quantized.onnx"
    run(example, bad("QuantizeInput"), output=quantized)
    result = run((quantized, example[1]), "dedup")
    assert result.report.verdict is Verdict.UNCHANGED


def test_the_same_words_give_the_same_bytes(example: Example) -> None:
    model, _ = example
    outputs = [model.with_name(f"{at}.onnx") for at in range(3)]
    passes = [DropIdentity(), Shuffle(), Round(step=0.01)]
    for output, seed in zip(outputs, (7, 7, 8), strict=True):
        run(example, passes, output=output, seed=seed)
    assert bits(outputs[0]) == bits(outputs[1])
    assert bits(outputs[0]) != bits(outputs[2])


def test_reports_are_written_whatever_happens(example: Example, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    run(example, DropIdentity(), reports=[path, tmp_path / "run.txt"])
    assert Report.from_json(path.read_text()).verdict is Verdict.PASSED
    assert "verdict   passed" in (tmp_path / "run.txt").read_text()
    with pytest.raises(VerdictError):
        run(example, Round(step=0.3), min_sqnr="60dB", reports=path, force=True)
    assert Report.from_json(path.read_text()).verdict is Verdict.FAILED
    with pytest.raises(PassError):
        run(example, [DropIdentity(), WrongValues()], reports=[path], force=True)
    failed = Report.from_json(path.read_text())
    assert failed.verdict is Verdict.ERROR
    assert failed.exit_code == 4
    assert failed.error is not None
    assert [record.status for record in failed.passes] == [Status.CHANGED, Status.FAILED]


def test_the_callers_proto_is_not_changed_and_no_file_is_needed() -> None:
    proto = classifier()
    before = proto.SerializeToString()
    feeds = [{"x": np.random.default_rng(at).standard_normal((1, 12)).astype(np.float32)} for at in range(5)]
    result = api.optimize(proto, [Round(step=0.01)], feeds=feeds, latency_seconds=0)
    assert proto.SerializeToString() == before
    assert result.report.verdict is Verdict.PASSED
    assert result.path is None
    model = api.load(proto)
    api.optimize(model, [Round(step=0.01)], feeds=feeds, latency_seconds=0)
    assert model.to_proto().SerializeToString() == before


def test_a_dry_run_does_all_but_write(example: Example) -> None:
    model, _ = example
    result = run(example, DropIdentity(), output=model.with_name("small.onnx"), dry_run=True)
    assert result.report.verdict is Verdict.PASSED
    assert result.path is None
    assert result.report.candidate is not None
    assert result.report.candidate.file_bytes < model.stat().st_size
    assert not model.with_name("small.onnx").exists()


RANDOM = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 4] x) => (float[N, 4] steady, float[N, 4] noisy) {
  noise = RandomNormalLike(x)
  again = Identity(x)
  steady = Add(again, x)
  noisy = Add(noise, x)
}
"""


def test_random_outputs_are_not_compared_and_it_is_said() -> None:
    feeds = [{"x": np.full((1, 4), at, np.float32)} for at in range(5)]
    report = api.optimize(parser.parse_model(RANDOM), DropIdentity(), feeds=feeds, latency_seconds=0).report
    assert report.verdict is Verdict.PASSED
    assert report.comparison is not None
    assert [output.name for output in report.comparison.outputs] == ["steady"]
    assert any("noisy" in warning for warning in report.warnings)


def test_where_all_outputs_are_random_nothing_is_proven() -> None:
    proto = parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N, 4] x) => (float[N, 4] noisy) {
          again = Identity(x)
          noise = RandomNormalLike(again)
          noisy = Add(noise, again)
        }
        """
    )
    feeds = [{"x": np.full((1, 4), at, np.float32)} for at in range(5)]
    with pytest.raises(NothingCompared):
        api.optimize(proto, DropIdentity(), feeds=feeds, latency_seconds=0)


def test_samples_limits_each_part(example: Example) -> None:
    report = run(example, DropIdentity(), samples=2).report
    assert report.feeds is not None
    assert (report.feeds.fit, report.feeds.select, report.feeds.evaluate) == (2, 2, 2)


def test_an_error_carries_its_exit_code(example: Example) -> None:
    codes = {}
    for name, passes in {"usage": "nowhere", "pass": bad("Raise")}.items():
        with pytest.raises(OnnxoptError) as caught:
            run(example, passes)
        codes[name] = caught.value.exit_code
    assert codes == {"usage": 2, "pass": 4}


def test_external_data_is_read_and_left_as_it_is(example: Example) -> None:
    model, data = example
    source = model.with_name("outside.onnx")
    onnx.save(classifier(), source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    before = bits(source), bits(model.with_name("weights.bin"))
    here = run((source, data), Round(step=0.05), output=model.with_name("a.onnx"))
    there = run(example, Round(step=0.05), output=model.with_name("b.onnx"))
    assert (bits(source), bits(model.with_name("weights.bin"))) == before
    assert here.report.reference.file_bytes == sum(map(len, before))
    assert here.path is not None
    assert there.path is not None
    assert onnx.load(here.path) == onnx.load(there.path)


def test_bodies_and_functions_go_through(tmp_path: Path) -> None:
    proto = parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        net (bool c, float[N, 4] x) => (float[N, 4] y) {
          twice = own.Twice(x)
          y = If(c) <then_branch = one () => (float[N, 4] a) { i = Identity(twice) a = Relu(i) },
                     else_branch = two () => (float[N, 4] b) { j = Identity(twice) b = Neg(j) }>
        }
        <domain: "own", opset_import: ["" : 17]>
        Twice (x) => (y) { k = Identity(x) y = Add(k, x) }
        """
    )
    feeds = [{"c": np.array(at % 2 == 0), "x": np.full((1, 4), at - 2.5, np.float32)} for at in range(6)]
    result = api.optimize(proto, DropIdentity(), feeds=feeds, latency_seconds=0, output=tmp_path / "out.onnx")
    assert len(result.report.passes[0].changes) == 3
    assert result.report.verdict is Verdict.PASSED
    left = {node.op for body in result.model.bodies() for node in body.nodes}
    assert left == {"Twice", "If", "Relu", "Neg", "Add"}


def test_preparation_is_inserted_and_shown(example: Example) -> None:
    records = run(example, bad("prepared")).report.passes
    assert [(record.name, record.inserted_for) for record in records] == [
        ("dedup", bad("prepared")),
        ("prepared", None),
    ]


@rewrite(name="idle", effect="exact", prepare=(bad("DropIdentity"), "dedup"))
def idle(graph: Graph) -> None:
    """Do nothing, after DropIdentity."""


@rewrite(name="eager", effect="exact", prepare=(bad("DropIdentity"),))
def eager(graph: Graph) -> None:
    """Name a node, after DropIdentity."""
    graph.nodes[0].name = "named"


def statuses(report: Report) -> dict[str, str]:
    return {record.name: record.status.value for record in report.passes}


def test_what_only_prepared_for_an_idle_pass_is_undone(example: Example) -> None:
    result = run(example, idle)
    assert statuses(result.report) == {"drop_identity": "undone", "dedup": "unchanged", "idle": "unchanged"}
    assert result.report.verdict is Verdict.UNCHANGED
    assert result.model.to_proto() == api.load(example[0]).to_proto()
    assert all((record.nodes_before, record.nodes_after) == (4, 4) for record in result.report.passes)
    assert "undone" in result.report.to_text()


def test_what_prepared_for_a_pass_that_worked_stays(example: Example) -> None:
    assert statuses(run(example, eager).report) == {"drop_identity": "changed", "eager": "changed"}
    result = run(example, [idle, eager])
    assert statuses(result.report)["drop_identity"] == "changed"
    assert result.model.node_count() == 3
    listed = run(example, [DropIdentity(), idle]).report
    assert [record.status for record in listed.passes] == [Status.CHANGED, *[Status.UNCHANGED] * 3]


def test_what_only_prepared_for_several_idle_passes_is_undone_behind_the_last(example: Example) -> None:
    result = run(example, [idle, idle])
    assert [record.status for record in result.report.passes] == [Status.UNDONE, *[Status.UNCHANGED] * 3]
    assert result.report.verdict is Verdict.UNCHANGED
    assert result.model.to_proto() == api.load(example[0]).to_proto()


def test_after_an_undoing_passes_are_held_against_the_stage_before_it(example: Example) -> None:
    @rewrite(name="idle_after_shuffle", effect="exact", prepare=(bad("Shuffle"),))
    def idle_after_shuffle(graph: Graph) -> None:
        """Do nothing, after the last bits were lost."""

    report = run(example, [idle_after_shuffle, DropIdentity()]).report
    assert statuses(report) == {"shuffle": "undone", "idle_after_shuffle": "unchanged", "drop_identity": "changed"}
    assert report.comparison is not None
    assert report.comparison.outputs[0].differing == 0


def test_a_failed_pass_takes_its_preparation_along(example: Example) -> None:
    @rewrite(name="failing", effect="exact", prepare=(bad("DropIdentity"),))
    def failing(graph: Graph) -> None:
        """Raise, after DropIdentity."""
        raise RuntimeError

    result = run(example, failing, on_error="skip")
    assert statuses(result.report) == {"drop_identity": "undone", "failing": "failed"}
    assert result.model.node_count() == 4
