from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from onnxopt.passbase import Change, Skip
from onnxopt.report import (
    KernelFigures,
    LoadFigures,
    MemoryFigures,
    OutputFigures,
    QuantizationFigures,
    Report,
    SaturationFigures,
    SizeFigures,
    Verdict,
)
from onnxopt.report.layout import WIDTH
from onnxopt.report.text_view import lines, plain
from tests.report.examples import check_report, footprint, full_report


def text(report: Report, detail: int = 0) -> str:
    return plain(report, detail)


def test_it_says_what_a_reader_asks() -> None:
    shown = text(full_report())
    words = " ".join(shown.split())
    for said in (
        "net.onnx -> net.onnxopt.onnx",
        "file 1.47 MB 380.1 kB 0.26 x",
        "zip 1.36 MB 301.0 kB 0.22 x",
        "memory 2.40 MB 1.20 MB 0.50 x",
        "load 8.00 ms 10.0 ms 1.25 x",
        "parameters 366,122 91,000 -75.1 %",
        "latency 1.23 ms 0.0655 ms 0.53 x",
        "memory: median of 8 loads; a difference up to 70.00 kB is noise",
        "load: median of 4 paired rounds, 1.200 to 1.300 latency:",
        "latency: median of 812 paired rounds, 0.520 to 0.540 (95 %), 1 thread",
        "top1 98.89 % 98.75 % -0.14 pt",
        "fold_constants (for prune) nothing to do",
        "prune:ratio=0.3 2 removed, 1 merged lossy 1.8 s",
        "prune: 5 x its channels are a graph output: /blocks.0/conv, /blocks.1/conv, /blocks.2/conv, ...",
        "logits float32 28.4 dB",
        "float32 exact",
        "class int64 99.99 %",
        "max_drop top1 <= 0.5 pt 0.14 pt kept",
        "the feeds are few",
        "verdict passed",
        "written net.onnxopt.onnx",
    ):
        assert said in words, said


def test_the_sizes_stand_above_the_counts_in_the_same_columns() -> None:
    shown = text(replace(full_report(), quantization=None)).splitlines()
    assert shown[:17] == [
        "net.onnx -> net.onnxopt.onnx",
        "",
        "              original     result     ratio",
        "  file         1.47 MB   380.1 kB    0.26 x",
        "  zip          1.36 MB   301.0 kB    0.22 x",
        "  memory       2.40 MB    1.20 MB    0.50 x",
        "  load         8.00 ms    10.0 ms    1.25 x",
        "  latency      1.23 ms  0.0655 ms    0.53 x",
        "",
        "                                     change",
        "  parameters   366,122     91,000   -75.1 %",
        "  nodes             24         31   +29.2 %",
        "  top1         98.89 %    98.75 %  -0.14 pt",
        "",
        "  memory: median of 8 loads; a difference up to 70.00 kB is noise",
        "  load: median of 4 paired rounds, 1.200 to 1.300",
        "  latency: median of 812 paired rounds, 0.520 to 0.540 (95 %), 1 thread",
    ]


def with_footprint(**figures: Any) -> Report:
    return replace(full_report(), footprint=replace(footprint(), **figures))


def test_memory_within_the_noise_is_the_same() -> None:
    words = " ".join(text(with_footprint(memory=MemoryFigures(900_000, 830_001, 70_000, 8))).split())
    assert "memory 900.0 kB 830.0 kB same load" in words
    words = " ".join(text(with_footprint(memory=MemoryFigures(900_000, 829_999, 70_000, 1))).split())
    assert "memory 900.0 kB 830.0 kB 0.92 x load" in words
    assert "memory: one load; a difference" in words


def test_one_round_of_loading_has_no_interval() -> None:
    assert "  load: one paired round\n" in text(with_footprint(load=LoadFigures(1.25, 1.25, 1.25, 1, 8.0, 10.0)))


def test_zstd_is_a_row_where_it_is_measured() -> None:
    words = " ".join(text(with_footprint(candidate=SizeFigures(9, 8, 7), reference=SizeFigures(9, 9, 700))).split())
    assert "zip 9 B 8 B 0.89 x zstd 700 B 7 B 0.010 x memory" in words


def test_what_was_not_measured_is_told_where_the_reader_may_miss_it() -> None:
    assert "zstd" not in text(full_report())
    assert "zstd not measured: zstandard is not installed" in text(full_report(), 1)
    large = with_footprint(
        unmeasured={"zip": "540.0 MB; ask with --compressed", "zstd": "540.0 MB; ask with --compressed"}
    )
    assert "zip, zstd not measured: 540.0 MB; ask with --compressed" in text(large)
    crashed = with_footprint(memory=None, load=None, unmeasured={"memory": "it crashed", "load": "it crashed"})
    assert "memory, load not measured: it crashed" in text(crashed)
    untimed = replace(crashed, latency=None)
    assert "not measured: it crashed" not in text(untimed)
    assert "not measured: it crashed" in text(untimed, 1)


def test_the_proof_of_a_quantized_result_is_told_in_few_lines() -> None:
    shown = text(full_report())
    words = " ".join(shown.split())
    for said in (
        "53 of 55 quantized layers run on integer kernels: QLinearConv 52, QLinearAdd 16, QGemm 1",
        "not fused: 2 x Conv: its output is not quantized: /blocks.7/conv, /blocks.9/conv",
        "on floats between codes: 1 x /act/Tanh",
        "3 layers left on floats; conversions left: 4 QuantizeLinear, 1,250 DequantizeLinear",
        "3 of 52 layers can saturate without VNNI: conv1, conv2, inner; 1 could not be looked at",
        "1 of 2 with the codes of 4 samples; 16 of 12,288 outputs do",
        "not proven: memory: the process was killed",
        "lowest SQNR of 9 layers on 4 samples, 2 not measured",
        "silent Gemm -inf dB",
        "Conv 24.0 dB 31.5 dB",
    ):
        assert said in words, said
    assert "30.0 dB" not in shown
    assert "30.0 dB" in text(full_report(), 1)
    assert "same" in text(full_report(), 1)


def test_a_sound_result_takes_three_lines_and_its_layers() -> None:
    kernels = KernelFigures(layers=2, integer=2, kernels={"QGemm": 2}, quantize_nodes=1)
    figures = QuantizationFigures(kernels, SaturationFigures(checked=2))
    shown = text(replace(check_report(), quantization=figures)).splitlines()
    at = shown.index("kernels")
    assert shown[at + 1 : at + 5] == [
        "  2 of 2 quantized layers run on integer kernels: QGemm 2",
        "  conversions left: 1 QuantizeLinear, 0 DequantizeLinear",
        "  no layer can saturate (2 looked at)",
        "",
    ]


def test_no_section_without_quantized_nodes() -> None:
    assert "kernels" not in text(check_report())
    assert "memory" not in text(check_report())


@pytest.mark.parametrize("detail", [0, 1])
@pytest.mark.parametrize("report", [full_report(), check_report()], ids=["optimize", "check"])
def test_no_line_is_wider_than_80_columns(report: Report, detail: int) -> None:
    assert max(map(len, text(report, detail).splitlines())) <= WIDTH


def test_long_names_and_many_outputs_stay_within_the_width() -> None:
    report = full_report()
    assert report.comparison is not None
    many = tuple(
        OutputFigures(f"/very/long/scope/name/of/an/output/{at:03d}", "bfloat16", 1, 1, 1e-30, 2.5e-10, -12.3, -0.5)
        for at in range(40)
    )
    report = replace(
        report,
        comparison=replace(report.comparison, outputs=many),
        passes=tuple(
            replace(record, text=f"{record.text}:exclude=/a/very/long/node/name+/another/long/name")
            for record in report.passes
        ),
    )
    shown = text(report)
    assert max(map(len, shown.splitlines())) <= WIDTH
    assert "and 28 outputs more" in shown


def test_detail_lists_every_change_and_skip() -> None:
    assert "removed conv1: 8 of 32 channels" not in text(full_report())
    shown = text(full_report(), 1)
    assert "removed conv1: 8 of 32 channels" in shown
    assert "/blocks.4/conv" in shown


def test_many_kinds_of_changes_are_folded() -> None:
    report = full_report()
    changes = tuple(Change(f"did something of kind {at} to", "node") for at in range(9))
    shown = text(replace(report, passes=(replace(report.passes[1], changes=changes),)))
    assert max(map(len, shown.splitlines())) <= WIDTH
    assert "kind 8 to" in " ".join(shown.split())


def test_many_reasons_are_cut_short_unless_asked_for() -> None:
    report = full_report()
    skipped = tuple(Skip(f"node{at}", f"reason {at}") for at in range(14))
    report = replace(report, passes=(replace(report.passes[1], skipped=skipped),))
    shown = text(report)
    assert "reason 9: node9" in shown
    assert "reason 10" not in shown
    assert "and 4 reasons more; -v lists them" in shown
    assert "reason 13: node13" in text(report, 1)


def test_a_failing_output_is_listed_first_with_its_problem() -> None:
    report = full_report()
    assert report.comparison is not None
    bad = OutputFigures("zz", "float32", 3, 3, 9.0, 2.0, -1.0, 0.1, problem="SQNR -1.0 dB is below 3 dB")
    shown = text(replace(report, comparison=replace(report.comparison, outputs=(*report.comparison.outputs, bad))))
    assert shown.index("zz ") < shown.index("logits ")
    assert "zz: SQNR -1.0 dB is below 3 dB" in shown


def test_a_broken_budget_stands_out() -> None:
    shown = text(check_report())
    assert "small.onnx held against base.onnx" in shown
    assert "BROKEN" in shown
    assert "verdict   failed: max_size is broken" in shown
    roles = {span.role for line in lines(check_report()) for span in line}
    assert "bad" in roles


def test_no_trailing_spaces_and_one_final_newline() -> None:
    shown = text(full_report())
    assert all(line == line.rstrip() for line in shown.splitlines())
    assert shown.endswith("\n")
    assert not shown.endswith("\n\n")


@pytest.mark.parametrize("verdict", list(Verdict))
def test_every_verdict_is_told_in_its_own_words(verdict: Verdict) -> None:
    assert f"verdict   {verdict.value}" in text(replace(full_report(), verdict=verdict))
