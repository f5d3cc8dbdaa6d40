from __future__ import annotations

import importlib
import re
import threading
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxopt import api
from onnxopt.errors import PassError, UsageError
from onnxopt.model import Model, files, load
from onnxopt.pipeline import VerdictError, compressed, footprint
from onnxopt.pipeline.compressed import Packed, Packing
from onnxopt.pipeline.settings import Settings
from onnxopt.report import FootprintFigures, Report, Verdict
from onnxopt.runtime.latency import Latency
from onnxopt.runtime.loads import DEFAULT_SECONDS, LoadMeter, Loads, Memory
from tests.pipeline.breaking_passes import DropIdentity, Round, SeeStatistics
from tests.pipeline.builders import Example, run

TIME = Latency(0.5, 0.45, 0.55, 8, 10.0, 5.0)
LOADS = Loads(Memory(2_000_000, 1_000_000, 5_000, 16), TIME)


class FakeMeter(LoadMeter):
    """Finds LOADS, or fails, and starts no process."""

    asked: list[tuple[int, int, float]] = []  # noqa: RUF012  of all instances, for the test to look at
    found: Loads | Exception = LOADS

    def __init__(self, **_: Any) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def wait_until_ready(self) -> None:
        pass

    def measure(self, reference: Path, candidate: Path, *, seconds: float = 0.3) -> Loads:
        self.asked.append((reference.stat().st_size, candidate.stat().st_size, seconds))
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> type[FakeMeter]:
    monkeypatch.setattr(footprint, "LoadMeter", FakeMeter)
    monkeypatch.setattr(FakeMeter, "asked", [])
    monkeypatch.setattr(FakeMeter, "found", LOADS)
    return FakeMeter


def found(report: Report) -> FootprintFigures:
    assert report.footprint is not None
    return report.footprint


def deflated(path: Path) -> int:
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    return len(packer.compress(path.read_bytes())) + len(packer.flush())


def test_both_models_are_measured_with_real_processes(example: Example, tmp_path: Path) -> None:
    report = run(example, Round(step=0.05), output=tmp_path / "small.onnx", latency_seconds=0.05).report
    figures = found(report)
    assert report.candidate is not None
    assert figures.reference.file_bytes == example[0].stat().st_size
    assert figures.candidate.file_bytes == report.candidate.file_bytes == (tmp_path / "small.onnx").stat().st_size
    assert figures.reference.deflate_bytes == report.reference.compressed_bytes == deflated(example[0])
    assert figures.candidate.deflate_bytes == report.candidate.compressed_bytes == deflated(tmp_path / "small.onnx")
    assert figures.load is not None
    assert figures.load.low <= figures.load.ratio <= figures.load.high
    assert figures.load.reference_ms > 0
    if figures.memory is not None:
        assert figures.memory.loads >= 4
        assert figures.memory.reference_bytes < 1 << 20
    assert set(figures.unmeasured) <= {"zstd", "memory"}
    assert Report.from_json(report.to_json()).footprint == figures


def low_entropy(example: Example) -> Path:
    """The example with most weights zero: as many bytes, but fewer to tell apart."""
    proto = onnx.load(example[0])
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if values.dtype == np.float32:
            values[np.abs(values) < np.quantile(np.abs(values), 0.9)] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    path = example[0].with_name("sparse.onnx")
    onnx.save(proto, path)
    return path


def test_zeros_make_the_zip_smaller_and_not_the_file(example: Example) -> None:
    sparse = low_entropy(example)
    report = api.check(sparse, example[0], example[1], min_sqnr="-99dB", latency_seconds=0)
    figures = found(report)
    assert figures.candidate.file_bytes == figures.reference.file_bytes
    one, two = figures.reference.deflate_bytes, figures.candidate.deflate_bytes
    assert one is not None
    assert two is not None
    assert two < 0.7 * one
    assert two == deflated(sparse)


def test_a_model_without_a_file_is_measured_as_the_file_it_makes(example: Example, meter: type[FakeMeter]) -> None:
    proto = onnx.load(example[0])
    there = found(run(example, Round(step=0.05), latency_seconds=0.05).report)
    here = found(api.optimize(proto, Round(step=0.05), example[1], latency_seconds=0.05).report)
    assert (here.candidate, here.memory) == (there.candidate, there.memory)
    assert len({candidate for _, candidate, _ in meter.asked}) == 1


def test_a_sidecar_counts(example: Example, tmp_path: Path, meter: type[FakeMeter]) -> None:
    path = tmp_path / "beside.onnx"
    onnx.save(onnx.load(example[0]), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    figures = found(api.check(path, example[0], example[1], latency_seconds=0))
    assert figures.candidate.file_bytes == path.stat().st_size + (tmp_path / "w.bin").stat().st_size
    assert figures.candidate.deflate_bytes == deflated(path) + deflated(tmp_path / "w.bin")
    output = tmp_path / "out.onnx"
    written = found(run(example, Round(step=0.05), output=output, external_data="always").report)
    assert written.candidate.deflate_bytes == sum(map(deflated, tmp_path.glob("out.*")))


def test_nothing_is_measured_of_a_result_that_did_not_change(example: Example, meter: type[FakeMeter]) -> None:
    report = run(example, SeeStatistics(), latency_seconds=0.05).report
    assert report.verdict is Verdict.UNCHANGED
    assert report.footprint is None
    assert meter.asked == []
    asked = run(example, SeeStatistics(), latency_seconds=0.05, max_memory="1.01x").report
    assert found(asked).memory is not None


def test_an_unverified_result_is_compressed_and_never_loaded(example: Example, meter: type[FakeMeter]) -> None:
    report = run(example, Round(step=0.05), verify=False, max_compressed="2x").report
    assert found(report).candidate.deflate_bytes is not None
    assert found(report).unmeasured["memory"] == found(report).unmeasured["load"] == "nothing was compared"
    assert report.budgets[0].passed
    assert meter.asked == []


def test_small_models_are_not_loaded_where_nothing_is_timed(
    example: Example, meter: type[FakeMeter], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = found(run(example, Round(step=0.05)).report)
    assert (figures.memory, figures.load) == (None, None)
    assert "timing is off" in figures.unmeasured["memory"]
    assert meter.asked == []
    monkeypatch.setattr(footprint, "SMALL", 0)
    figures = found(run(example, Round(step=0.05)).report)
    assert figures.memory is not None
    assert figures.load is None
    assert figures.unmeasured["load"] == "timing is off"
    assert [seconds for _, _, seconds in meter.asked] == [0]


@pytest.mark.parametrize(
    ("kind", "kept", "broken"),
    [
        ("max_compressed", ["2x", "200%", "+100%", "1MB"], ["0.001x", "-99.9%", "1B"]),
        ("max_memory", ["0.5x", "50%", "-50%", "1MB"], ["0.49x", "-51%", "0.9MB"]),
        ("max_load", ["0.5x", "-50%", "+0%", "5ms", "1s"], ["0.49x", "-51%", "4.9ms"]),
    ],
)
def test_budgets_hold_and_break_in_runs_and_checks(
    example: Example, meter: type[FakeMeter], kind: str, kept: list[str], broken: list[str]
) -> None:
    result = run(example, DropIdentity(), latency_seconds=0.01, **{kind: kept})
    assert [(budget.name, budget.passed) for budget in result.report.budgets] == [(kind, True)] * len(kept)
    small = example[0].with_name("small.onnx")
    result.model.save(small)
    output = example[0].with_name("no.onnx")
    with pytest.raises(VerdictError, match=f"{kind} is .* allowed is <= {re.escape(broken[0])}"):
        run(example, DropIdentity(), latency_seconds=0.01, output=output, **{kind: broken[0]})
    assert not output.exists()
    report = api.check(small, example[0], example[1], {kind: [*kept, *broken]}, latency_seconds=0.01)
    assert [budget.passed for budget in report.budgets] == [True] * len(kept) + [False] * len(broken)
    assert (report.verdict, report.exit_code) == (Verdict.FAILED, 1)
    assert api.check(small, example[0], example[1], {kind: kept}, latency_seconds=0.01).verdict is Verdict.PASSED


def test_a_change_is_told_as_a_change(example: Example, meter: type[FakeMeter]) -> None:
    (budget,) = run(example, DropIdentity(), latency_seconds=0.01, max_memory="-40%").report.budgets
    assert (budget.limit, budget.measured) == ("<= -40%", "-50%")


def test_a_budget_on_loading_gets_the_time_that_latency_gets(example: Example, meter: type[FakeMeter]) -> None:
    run(example, DropIdentity(), latency_seconds=0.01)
    run(example, DropIdentity(), latency_seconds=0.01, max_load="2x")
    assert [seconds for _, _, seconds in meter.asked] == [DEFAULT_SECONDS, 0.01]


def test_budgets_that_can_not_be_measured_are_refused(example: Example) -> None:
    with pytest.raises(UsageError, match="max_load is given, but timing is off"):
        run(example, DropIdentity(), max_load="1x")
    for kind in ("max_load", "max_memory"):
        with pytest.raises(UsageError, match=f"{kind} is given, but the result is not run"):
            run(example, DropIdentity(), verify=False, latency_seconds=1, **{kind: "1x"})


def test_a_process_that_fails_leaves_the_figures_out_and_the_run_goes_on(
    example: Example, meter: type[FakeMeter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "found", PassError("its process was ended by signal SIGSEGV", "none"))
    report = run(example, DropIdentity(), latency_seconds=0.01).report
    assert report.verdict is Verdict.PASSED
    assert found(report).memory is None
    assert found(report).load is None
    assert found(report).unmeasured["memory"] == "its process was ended by signal SIGSEGV"
    assert "memory, load not measured: its process was ended by signal SIGSEGV" in report.to_text()
    with pytest.raises(VerdictError) as caught:
        run(example, DropIdentity(), latency_seconds=0.01, max_memory="2x")
    (budget,) = caught.value.result.report.budgets
    assert (budget.passed, budget.measured) == (False, "not measured")
    assert "SIGSEGV" in budget.detail


def test_a_real_process_that_takes_too_long_fails_no_run(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "LoadMeter", lambda **settings: LoadMeter(**{**settings, "timeout": 0.01}))
    report = run(example, DropIdentity(), latency_seconds=0.01).report
    assert report.verdict is Verdict.PASSED
    assert found(report).unmeasured["load"] == "the models did not load within 0.01 s"


def test_a_system_that_does_not_tell_memory(
    example: Example, meter: type[FakeMeter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "found", Loads(None, TIME))
    figures = found(run(example, DropIdentity(), latency_seconds=0.01).report)
    assert figures.load is not None
    assert figures.unmeasured["memory"] == "this system does not tell it"


def test_large_files_are_compressed_when_asked_for(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "COMPRESS_UP_TO", 100)
    report = run(example, DropIdentity()).report
    assert found(report).reference.deflate_bytes is found(report).candidate.deflate_bytes is None
    assert report.reference.compressed_bytes is None
    assert "zip, zstd not measured: " in report.to_text()
    assert "ask with --compressed" in report.to_text()
    for asked in ({"compressed": True}, {"max_compressed": "2x"}):
        assert found(run(example, DropIdentity(), **asked).report).candidate.deflate_bytes is not None
    assert found(
        api.check(example[0], example[0], example[1], latency_seconds=0, compressed=True)
    ).unmeasured.keys() <= {
        "zstd",
        "memory",
        "load",
    }


def test_one_model_is_not_compressed_for_itself(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tmp_path / "large.onnx"
    proto = onnx.load(example[0])
    proto.doc_string = "a word more"
    onnx.save(proto, large)
    monkeypatch.setattr(footprint, "COMPRESS_UP_TO", example[0].stat().st_size)
    model = load(example[0])
    for one, two, begun in ((example[0], large, 1), (large, example[0], 0)):
        with footprint.FootprintMeter(model, one, Settings(latency_seconds=0), ()) as scale:
            scale.add(model, two)
            figures = scale.measure((1, 1)).figures()
            assert len(scale._packed) == begun
        assert (figures.reference.deflate_bytes, figures.candidate.deflate_bytes) == (None, None)
        assert "ask with --compressed" in figures.unmeasured["zip"]


def test_a_result_too_large_for_a_temporary_file_is_left_out(
    example: Example, meter: type[FakeMeter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "INLINE_LIMIT", 10)
    with footprint.FootprintMeter(load(example[0]), example[0], Settings(), ()) as scale:
        scale.add(load(example[0]))
        figures = scale.measure((1, 1)).figures()
    assert figures.unmeasured == dict.fromkeys(("zip", "zstd", "memory", "load"), footprint._TOO_LARGE)


def test_nothing_is_left_behind(example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run(example, Round(step=0.05), latency_seconds=0.01)
    with pytest.raises(PassError):
        run(example, f"{Path(__file__).parent / 'breaking_passes.py'}:Raise")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("onnxopt-")] == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("onnxopt-compress")] == []


def test_the_result_is_the_same_bytes_with_and_without_figures(example: Example) -> None:
    def content(model: Model) -> bytes:
        return bytes(model.to_proto().SerializeToString())

    one, two = (run(example, Round(step=0.05), latency_seconds=seconds) for seconds in (0, 0.01))
    assert content(one.model) == content(two.model)


def test_packing_counts_each_file_and_ends_early_when_left(tmp_path: Path) -> None:
    both = [tmp_path / "a", tmp_path / "b"]
    both[0].write_bytes(b"ab" * 100_000)
    both[1].write_bytes(np.random.default_rng(0).bytes(3_000_000))
    with Packing() as packing:
        future = packing.begin(both)
        packing.settle()
        assert future.done()
        assert future.result().deflate == sum(map(deflated, both))
        gone = packing.begin([tmp_path / "gone"])
        packing.settle()
        with pytest.raises(FileNotFoundError):
            gone.result()
    with Packing() as packing:
        packing.stop()
        assert (packing.begin(both).result().deflate or 0) < 10


def test_a_file_that_goes_away_is_told(example: Example) -> None:
    with footprint.FootprintMeter(load(example[0]), example[0], Settings(latency_seconds=0), ()) as scale:
        scale.add(load(example[0]), example[0])
        scale._packed[1] = scale._packing.begin([example[0].with_name("gone.onnx")])
        figures = scale.measure((1, 1)).figures()
    assert "gone.onnx can't be read" in figures.unmeasured["zip"]
    assert figures.candidate.deflate_bytes is None


class FakePacker:
    def compress(self, data: bytes) -> bytes:
        return data[: len(data) // 4]

    def flush(self) -> bytes:
        return b"."


@pytest.mark.parametrize("name", ["compression.zstd", "zstandard"])
def test_zstd_is_counted_where_there_is_a_module_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def module(wanted: str) -> Any:
        if wanted != name:
            raise ImportError(wanted)
        made: Any = FakePacker()
        if name == "zstandard":
            made = types.SimpleNamespace(compressobj=FakePacker)
        return types.SimpleNamespace(ZstdCompressor=lambda level: made)

    monkeypatch.setattr(importlib, "import_module", module)
    file = tmp_path / "a"
    file.write_bytes(bytes(400))
    with Packing() as packing:
        assert packing.begin([file, file]).result().zstd == 202


def test_without_a_module_for_zstd_the_reason_is_told(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "zstd_packer", lambda: None)
    with Packing() as packing:
        assert packing.begin([example[0]]).result() == Packed(deflated(example[0]), None, compressed._NO_ZSTD)
    report = run(example, DropIdentity()).report
    assert found(report).candidate.zstd_bytes is None
    assert found(report).unmeasured["zstd"].endswith("pip install onnxopt[zstd]")
    assert "zstd" not in report.to_text()


def test_the_real_zstd_gives_a_stream_that_it_reads_back(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    packer = compressed.zstd_packer()
    assert packer is not None
    data = b"onnxopt" * 1000
    packed = packer.compress(data) + packer.flush()
    assert len(packed) < len(data) / 10
    assert zstandard.ZstdDecompressor().decompressobj().decompress(packed) == data
