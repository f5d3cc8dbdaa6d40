"""Statistics gathered apart from the run that uses them: by the Python face, as files, in parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

import onnxopt
from onnxopt.calibration.storage import SavedStatistics
from onnxopt.errors import FeedError, NothingCompared, UsageError
from onnxopt.feeds import Split, open_feeds
from onnxopt.pipeline import SavedFiles
from onnxopt.report import Verdict
from onnxopt.runtime import Session
from tests.pipeline.builders import Example, bad, classifier

INT8 = "int8:all_layers=true"


@pytest.fixture
def stats(example: Example) -> Path:
    """Statistics of the example, gathered on all its feeds."""
    model, data = example
    path = model.with_name("all.stats.npz")
    onnxopt.calibrate(model, data, passes=INT8, output=path)
    return path


def arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files if name != "meta"}


def made_up(model: Path) -> Split:
    """Inputs made up from the model's signature."""
    return open_feeds([], Session(onnxopt.load(model), optimize=False).inputs)


def test_a_run_with_saved_statistics_gives_the_model_that_a_run_with_feeds_gives(example: Example) -> None:
    model, data = example
    parts = model.with_name("parts")
    parts.mkdir()
    with np.load(data) as file:
        for name, chosen in (("fit", slice(0, 20)), ("select", slice(20, 25)), ("evaluate", slice(25, 30))):
            np.savez(parts / f"{name}.npz", **{key: file[key][chosen] for key in file.files})
    calibration = onnxopt.calibrate(model, parts, passes=INT8)
    assert calibration.saved.samples == 20
    assert calibration.gathered_for == "int8"
    direct = onnxopt.optimize(model, INT8, parts, latency_seconds=0)
    for statistics in (calibration, calibration.saved, [calibration]):
        saved = onnxopt.optimize(model, INT8, parts, statistics=statistics, latency_seconds=0)
        assert saved.model.content_digest() == direct.model.content_digest()


def test_other_feeds_give_other_statistics(example: Example, stats: Path) -> None:
    model, data = example
    with np.load(data) as file:
        np.savez(model.with_name("wide.npz"), **{**file, "x": file["x"] * 3})
    wide = onnxopt.calibrate(model, model.with_name("wide.npz"), passes=INT8)
    one = onnxopt.optimize(model, INT8, data, statistics=stats, latency_seconds=0)
    other = onnxopt.optimize(model, INT8, data, statistics=wide.saved, latency_seconds=0)
    assert one.model.content_digest() != other.model.content_digest()


@pytest.mark.parametrize("numbers", [(1, 2, 3, 4), (0, 1, 2, 3), (4, 2, 1, 3)])
def test_parts_merge_to_the_whole(example: Example, stats: Path, numbers: tuple[int, ...]) -> None:
    model, data = example
    paths = [model.with_name(f"{number}.npz") for number in numbers]
    for number, path in zip(numbers, paths, strict=True):
        onnxopt.calibrate(model, data, passes=INT8, shard=(number, 4), output=path)
    merged = model.with_name("merged.npz")
    onnxopt.merge(paths, output=merged)
    whole, together = arrays(stats), arrays(merged)
    assert whole.keys() == together.keys()
    for name, array in whole.items():
        if not name.endswith("_low"):
            assert array.tobytes() == together[name].tobytes(), name
    assert SavedStatistics.load(merged).provenance == SavedStatistics.load(stats).provenance
    direct = onnxopt.optimize(model, INT8, data, statistics=stats, latency_seconds=0)
    sharded = onnxopt.optimize(model, INT8, data, statistics=merged, latency_seconds=0)
    assert direct.model.content_digest() == sharded.model.content_digest()


def test_a_part_is_not_used_as_if_it_were_the_whole(example: Example) -> None:
    model, data = example
    part = onnxopt.calibrate(model, data, passes=INT8, shard=(2, 3)).saved
    with pytest.raises(UsageError, match="holds part 2/3 of a calibration"):
        onnxopt.optimize(model, INT8, data, statistics=part)


def test_missing_double_and_foreign_parts_are_refused(example: Example, stats: Path) -> None:
    model, data = example
    paths = [model.with_name(f"{number}of3.npz") for number in (1, 2, 3)]
    for number, path in enumerate(paths, start=1):
        onnxopt.calibrate(model, data, passes=INT8, shard=(number, 3), output=path)
    with pytest.raises(UsageError, match="part 2/3 is missing"):
        onnxopt.merge([paths[0], paths[2]])
    with pytest.raises(UsageError, match="part 2/3 is missing, and 1 more"):
        onnxopt.merge([paths[0]])
    with pytest.raises(UsageError, match="is the same part as"):
        onnxopt.merge([*paths, paths[1]])
    with pytest.raises(UsageError, match=r"all\.stats\.npz: it is no part"):
        onnxopt.merge([*paths, stats])
    other = model.with_name("1of2.npz")
    onnxopt.calibrate(model, data, passes=INT8, shard=(1, 2), output=other)
    with pytest.raises(UsageError, match="parts of different divisions"):
        onnxopt.merge([*paths, other])
    with pytest.raises(UsageError, match="same feeds"):
        onnxopt.merge([stats, stats])


def test_whole_calibrations_over_other_feeds_add_up(example: Example, stats: Path) -> None:
    model, data = example
    with np.load(data) as file:
        np.savez(model.with_name("more.npz"), x=file["x"] * 2)
    more = model.with_name("more.stats.npz")
    onnxopt.calibrate(model, model.with_name("more.npz"), passes=INT8, output=more)
    both = onnxopt.merge([stats, more])
    assert both.samples == 60
    one = SavedStatistics.load(stats)
    counts = [tally.arrays()["count"] for tally in one.tallies.values() if "count" in tally.arrays()]
    doubled = [tally.arrays()["count"] for tally in both.tallies.values() if "count" in tally.arrays()]
    assert counts
    assert [2 * count for count in counts] == doubled


def test_statistics_of_another_model_are_refused_at_once(example: Example, stats: Path) -> None:
    model, data = example
    other = model.with_name("other.onnx")
    onnx.save(classifier(seed=5), other)
    with pytest.raises(
        UsageError, match=r"all\.stats\.npz: it was gathered on another model, or another state of net\.onnx"
    ):
        onnxopt.optimize(other, INT8, data, statistics=stats)


def test_statistics_of_another_graph_are_refused(example: Example, stats: Path) -> None:
    model, data = example
    drop = bad("DropIdentity")
    with pytest.raises(
        UsageError, match=r"^pass 'int8': no statistics are of the graph that it gets .*all\.stats\.npz is of"
    ):
        onnxopt.optimize(model, f"{drop},{INT8}", data, statistics=stats)
    fitting = onnxopt.calibrate(model, data, passes=f"{drop},{INT8}").saved
    assert "DropIdentity" in fitting.provenance.graph
    result = onnxopt.optimize(model, f"{drop},{INT8}", data, statistics=[stats, fitting], latency_seconds=0)
    assert result.report.verdict is Verdict.PASSED


def test_statistics_that_lack_what_a_pass_asks_for_are_refused(example: Example, stats: Path) -> None:
    model, data = example
    with pytest.raises(UsageError, match=r"^pass 'int8': .* lacks extremes, which it asks for"):
        onnxopt.optimize(model, f"{INT8}:calibrator=moving_average", data, statistics=stats)


def test_without_real_inputs_nothing_is_gathered(example: Example) -> None:
    with pytest.raises(NothingCompared, match="no real inputs to calibrate with"):
        onnxopt.calibrate(example[0])


def test_saved_statistics_serve_without_data(example: Example, stats: Path) -> None:
    result = onnxopt.optimize(example[0], INT8, statistics=stats, latency_seconds=0)
    assert result.report.verdict is Verdict.SYNTHETIC
    assert result.report.feeds is not None
    assert "drawn from the statistics" in result.report.feeds.note
    assert f"statistics of 30 samples from {stats}" in result.report.feeds.note
    assert any(change.kind == "quantized" for record in result.report.passes for change in record.changes)


def test_real_inputs_to_judge_on_are_enough_beside_statistics(example: Example, stats: Path) -> None:
    model, data = example
    settings: dict[str, Any] = {"evaluate": data, "require_data": True, "latency_seconds": 0}
    assert onnxopt.optimize(model, INT8, statistics=stats, **settings).report.verdict is Verdict.PASSED
    with pytest.raises(NothingCompared):
        onnxopt.optimize(model, INT8, **settings)
    with pytest.raises(NothingCompared):
        onnxopt.optimize(model, INT8, statistics=stats, require_data=True)


def test_statistics_that_no_pass_asks_for_are_told(example: Example, stats: Path) -> None:
    model, data = example
    report = onnxopt.optimize(model, "dedup", data, statistics=stats, latency_seconds=0).report
    assert f"no pass asked for {stats}" in report.warnings
    report = onnxopt.optimize(model, INT8, data, statistics=stats, latency_seconds=0).report
    assert not any("no pass asked" in warning for warning in report.warnings)


def test_wrong_statistics_stop_a_run_that_skips_failing_passes(example: Example, stats: Path) -> None:
    model, data = example
    with pytest.raises(UsageError, match="no statistics are of the graph"):
        onnxopt.optimize(model, f"{bad('DropIdentity')},{INT8}", data, statistics=stats, on_error="skip")


def test_passes_that_ask_for_nothing(example: Example, stats: Path) -> None:
    model, data = example
    with pytest.raises(UsageError, match="none of the passes asks for statistics: prune, dedup"):
        onnxopt.calibrate(model, data, passes="prune,dedup")
    with pytest.raises(UsageError, match="hold all statistics that are asked for: int8"):
        onnxopt.calibrate(model, data, passes=INT8, statistics=stats)


def test_later_passes_calibrate_behind_earlier_ones(example: Example) -> None:
    model, data = example
    see = bad("SeeStatistics")
    first = onnxopt.calibrate(model, data, passes=f"{see},{INT8}")
    assert first.gathered_for == see
    second = onnxopt.calibrate(model, data, passes=f"{see},{INT8}", statistics=first.saved)
    assert second.gathered_for == "int8"
    statistics = [first.saved, second.saved]
    result = onnxopt.optimize(model, f"{see},{INT8}", data, statistics=statistics, latency_seconds=0)
    assert result.report.verdict is Verdict.PASSED


def test_samples_are_drawn_by_the_seed(example: Example) -> None:
    model, data = example
    one, same, other = (onnxopt.calibrate(model, data, passes=INT8, samples=7, seed=seed).saved for seed in (1, 1, 2))
    assert one.samples == 7
    assert one.to_bytes() == same.to_bytes()
    assert one.provenance.feeds != other.provenance.feeds


def test_joined_feeds_give_the_same_ranges(example: Example, stats: Path) -> None:
    model, data = example
    joined = onnxopt.calibrate(model, data, passes=INT8, batch=8).saved
    assert (joined.samples, joined.runs) == (30, 4)
    whole = SavedStatistics.load(stats)
    for (kind, key), tally in whole.tallies.items():
        for name, array in tally.arrays().items():
            other = joined.tallies[kind, key].arrays()[name]
            if not name.endswith("_low"):
                np.testing.assert_allclose(other, array, rtol=1e-6, err_msg=f"{kind} {key} {name}")


def test_models_with_a_fixed_batch_refuse_batches(example: Example) -> None:
    model, data = example
    proto = onnx.load(model)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    fixed = model.with_name("fixed.onnx")
    onnx.save(proto, fixed)
    with pytest.raises(UsageError, match=r"feeds can't be joined into batches: input x.* fixes its first dimension"):
        onnxopt.calibrate(fixed, data, passes=INT8, batch=4)
    assert onnxopt.calibrate(fixed, data, passes=INT8).saved.samples == 30


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shard": (5, 4)}, "no such part"),
        ({"shard": (-1, 4)}, "no such part"),
        ({"shard": (0, 0)}, "no parts"),
        ({"shard": (31, 40)}, "holds none of the 30 feeds"),
        ({"batch": 0}, "is no number of feeds"),
        ({"samples": 0}, "too few"),
        ({"elements": 0}, "too few"),
        ({"passes": "nonsense"}, "nonsense"),
        ({"statistics": "missing.npz"}, "no such file"),
    ],
)
def test_wrong_settings(example: Example, settings: dict[str, Any], words: str) -> None:
    model, data = example
    with pytest.raises(UsageError, match=words):
        onnxopt.calibrate(model, data, **{"passes": INT8, **settings})


def test_inputs_are_never_replaced(example: Example, stats: Path) -> None:
    model, data = example
    for path in (model, data):
        before = path.read_bytes()
        with pytest.raises(UsageError, match=r"is the input itself|is read by this run"):
            onnxopt.calibrate(model, data, passes=INT8, output=path, force=True)
        assert path.read_bytes() == before
    with pytest.raises(UsageError, match="exists already"):
        onnxopt.calibrate(model, data, passes=INT8, output=stats)
    for files in ([stats], stats, str(stats)):
        with pytest.raises(UsageError, match="is read by this run"):
            onnxopt.merge(files, output=stats, force=True)


def test_feeds_in_folders_and_files_of_functions_are_never_replaced(example: Example, stats: Path) -> None:
    model, data = example
    folder, script = model.with_name("feeds"), model.with_name("feeds.py")
    folder.mkdir()
    with np.load(data) as file:
        for index in range(4):
            np.savez(folder / f"{index}.npz", x=file["x"][index : index + 1])
    script.write_text("import numpy as np\ndef feeds():\n    return [{'x': np.ones((1, 12), np.float32)}]\n")
    beside = model.with_name("net.feeds.npz")
    beside.write_bytes(data.read_bytes())
    named: list[tuple[Any, Path]] = [(folder, folder / "2.npz"), (f"{script}:feeds", script), (None, beside)]
    for feeds, path in named:
        before = path.read_bytes()
        with pytest.raises(UsageError, match="is read by this run"):
            onnxopt.calibrate(model, feeds, passes=INT8, output=path, force=True)
        with pytest.raises(UsageError, match="is read by this run"):
            onnxopt.optimize(model, INT8, feeds, output=path, force=True)
        assert path.read_bytes() == before


def test_statistics_never_come_to_lie_among_the_feeds(example: Example) -> None:
    model, data = example
    folder, parts = model.with_name("feeds"), model.with_name("parts")
    for place, names in ((folder, ("one",)), (parts, ("fit", "evaluate"))):
        place.mkdir()
        for name in names:
            (place / f"{name}.npz").write_bytes(data.read_bytes())
    with pytest.raises(UsageError, match=r"stats\.npz would be read as one of the feeds in .*feeds$"):
        onnxopt.calibrate(model, folder, passes=INT8, output=folder / "stats.npz")
    onnxopt.calibrate(model, parts, passes=INT8, output=parts / "stats.npz")
    onnxopt.calibrate(model, parts, passes=INT8, output=parts / "stats.npz", force=True)
    with pytest.raises(UsageError, match="is read by this run"):
        onnxopt.calibrate(model, parts, passes=INT8, output=parts / "fit.npz", force=True)


def test_a_run_never_replaces_its_statistics(example: Example, stats: Path) -> None:
    model, data = example
    named = stats.with_suffix(".json")
    named.write_bytes(stats.read_bytes())
    both: list[dict[str, Any]] = [{"output": named}, {"reports": named}]
    for places in both:
        with pytest.raises(UsageError, match=r"is read by this run|the run uses that file"):
            onnxopt.optimize(model, INT8, data, statistics=named, force=True, **places)
    assert named.read_bytes() == stats.read_bytes()


def test_inputs_that_were_always_empty_are_made_up_without_statistics(tmp_path: Path) -> None:
    proto = classifier()
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    model = tmp_path / "net.onnx"
    onnx.save(proto, model)
    gathered = onnxopt.calibrate(model, [{"x": np.zeros((0, 12), np.float32)}], passes=INT8).saved
    split = SavedFiles(gathered).like_measured(made_up(model), 0)
    assert "drawn from the statistics" not in split.note
    assert np.isfinite(split.evaluate[0].inputs["x"]).all()


def test_a_pass_that_needs_no_statistics_of_a_model_is_named(tmp_path: Path) -> None:
    model = tmp_path / "relu.onnx"
    onnx.save(
        parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,4] y) {y = Relu(x)}'),
        model,
    )
    with pytest.raises(UsageError, match="pass 'int8' needs no statistics of this model"):
        onnxopt.calibrate(model, [{"x": np.ones((1, 4), np.float32)}])


def test_a_bad_sample_in_the_middle_leaves_no_file(example: Example) -> None:
    model, data = example
    with np.load(data) as file:
        values = {name: file[name].copy() for name in file.files}
    values["x"][17, 3] = np.nan
    broken, output = model.with_name("broken.npz"), model.with_name("out.npz")
    np.savez(broken, **values)
    with pytest.raises(FeedError, match=r"input 'x' holds NaN for sample .*broken\.npz\[17\]"):
        onnxopt.calibrate(model, broken, passes=INT8, output=output)
    assert not output.exists()
    feeds = [{"x": row[None]} for row in values["x"][:5]]
    feeds[3] = {"x": np.zeros((1, 5), np.float32)}
    with pytest.raises(FeedError, match=r"feeds\[3\]: input 'x': "):
        onnxopt.calibrate(model, feeds, passes=INT8, output=output)

    def failing() -> Any:
        yield feeds[0]
        raise ValueError("the disk is gone")

    with pytest.raises(FeedError, match=r"feeds\[1\]: it failed: ValueError: the disk is gone"):
        onnxopt.calibrate(model, failing(), passes=INT8, output=output)
    with pytest.raises(FeedError, match="no feed"):
        onnxopt.calibrate(model, [], passes=INT8, output=output)
    assert not output.exists()


def test_the_caller_s_model_is_not_touched(example: Example) -> None:
    model = onnxopt.load(example[0])
    before = model.digest()
    onnxopt.calibrate(model, example[1], passes=INT8)
    assert model.digest() == before


def test_a_statistics_object_says_where_it_came_from(example: Example) -> None:
    saved = onnxopt.calibrate(example[0], example[1], passes=INT8, shard=(1, 2)).saved
    told = dataclasses.asdict(saved.provenance)
    assert told["model"] == "net.onnx"
    assert told["model_digest"] == onnxopt.load(example[0]).content_digest()
    assert told["shard"] == (1, 2)
