"""Reports with something in every field."""

from __future__ import annotations

import math

from onnxopt.passbase import Change, Skip
from onnxopt.report import (
    BudgetFigures,
    ComparisonFigures,
    FeedFacts,
    FootprintFigures,
    KernelFigures,
    LatencyFigures,
    LayerFigures,
    LoadFigures,
    MemoryFigures,
    MetricFigures,
    ModelFacts,
    OutputFigures,
    PassRecord,
    QuantizationFigures,
    Report,
    SaturationFigures,
    SaturationRisk,
    SizeFigures,
    Status,
    UnfusedLayer,
    Verdict,
)

VERSIONS = {"onnxopt": "0.1.0", "onnx": "1.23.2", "onnxruntime": "1.32.0", "numpy": "2.4.0", "python": "3.11.9"}

MEMORY = MemoryFigures(2_400_000, 1_200_000, 70_000, 8)


def footprint() -> FootprintFigures:
    """Figures of two models of which everything was measured but Zstandard."""
    return FootprintFigures(
        reference=SizeFigures(1_468_055, 1_360_000),
        candidate=SizeFigures(380_123, 301_000),
        memory=MEMORY,
        load=LoadFigures(1.25, 1.2, 1.3, 4, 8.0, 10.0),
        unmeasured={"zstd": "zstandard is not installed: pip install onnxopt[zstd]"},
    )


def quantization() -> QuantizationFigures:
    """Figures of a result with everything that can be wrong with one."""
    return QuantizationFigures(
        kernels=KernelFigures(
            layers=55,
            integer=53,
            kernels={"QLinearConv": 52, "QLinearAdd": 16, "QGemm": 1},
            unfused=(
                UnfusedLayer("/blocks.7/conv", "Conv", "its output is not quantized"),
                UnfusedLayer("/blocks.9/conv", "Conv", "its output is not quantized"),
            ),
            float_layers=3,
            between_codes=("/act/Tanh",),
            quantize_nodes=4,
            dequantize_nodes=1_250,
        ),
        saturation=SaturationFigures(
            checked=52,
            unread=1,
            risks=(
                SaturationRisk("conv1", "Conv", 255, True, 4096, 16),
                SaturationRisk("conv2", "Conv", 17, False, 8192, 0),
                SaturationRisk("inner", "MatMul"),
            ),
            samples=4,
        ),
        layers=(
            *(
                LayerFigures(f"/layers.{at}/a/rather/long/scope/of/a/layer/conv", "Conv", f"t{at}", 30.0 - at, 31.5)
                for at in range(7)
            ),
            LayerFigures("same", "Gemm", "s", math.inf),
            LayerFigures("silent", "Gemm", "n", -math.inf),
        ),
        samples=4,
        unmeasured=2,
        memory=MEMORY,
        notes=("memory: the process was killed",),
    )


def full_report() -> Report:
    before = ModelFacts("models/net.onnx", "ab" * 32, 1_468_055, 1_360_000, 366_122, 24, 17, 8)
    after = ModelFacts("net.onnxopt.onnx", "cd" * 32, 380_123, 301_000, 91_000, 31, 17, 8)
    figures = (
        OutputFigures("logits", "float32", 7190, 7000, 0.31, 0.012, 28.41, 0.99931, argmax_agreement=0.998),
        OutputFigures("features_of_the_last_stage_before_the_head", "float32", 9, 0, 0.0, 0.0, math.inf, 1.0),
        OutputFigures("class", "int64", 719, 1, agreement=0.99999),
    )
    passes = (
        PassRecord("fold_constants", "fold_constants", "exact", Status.UNCHANGED, inserted_for="prune"),
        PassRecord(
            "prune",
            "prune:ratio=0.3",
            "lossy",
            Status.CHANGED,
            changes=(
                Change("removed", "conv1", "8 of 32 channels"),
                Change("removed", "conv2"),
                Change("merged", "c3"),
            ),
            skipped=tuple(Skip(f"/blocks.{at}/conv", "its channels are a graph output") for at in range(5)),
            notes=("ratio=auto would look for the share itself",),
            nodes_before=24,
            nodes_after=24,
            parameters_before=366_122,
            parameters_after=256_000,
            seconds=1.26,
            verify_seconds=0.5,
            comparison=ComparisonFigures("the original", "quality floor", 8, figures[:1]),
        ),
        PassRecord("int8", "int8", "lossy", Status.CHANGED, changes=(Change("quantized", "conv1"),), seconds=0.4),
    )
    return Report(
        command="optimize",
        versions=VERSIONS,
        reference=before,
        candidate=after,
        verdict=Verdict.PASSED,
        reason="",
        exit_code=0,
        passes_text="prune:ratio=0.3,int8",
        target="x86",
        seed=7,
        threads=1,
        passes=passes,
        feeds=FeedFacts("719 samples of models/feeds", False, 431, 144, 144, "ff" * 16),
        comparison=ComparisonFigures("the original", "quality floor", 719, figures),
        metrics=(MetricFigures("top1", 0.9889, 0.9875, 0.0014, True, True, 719),),
        latency=LatencyFigures(0.531, 0.52, 0.54, 812, 1.234, 0.0655, 1),
        footprint=footprint(),
        quantization=quantization(),
        budgets=(BudgetFigures("max_drop top1", "<= 0.5 pt", "0.14 pt", True, "98.89 % -> 98.75 %"),),
        warnings=("the feeds are few",),
        seconds=12.5,
    )


def check_report() -> Report:
    before = ModelFacts("base.onnx", None, 1000, None, 10, 2, 13, 7)
    return Report(
        command="check",
        versions=VERSIONS,
        reference=before,
        candidate=ModelFacts("small.onnx", None, 500, None, 10, 2, 13, 7),
        verdict=Verdict.FAILED,
        reason="max_size is broken",
        exit_code=1,
        budgets=(BudgetFigures("max_size", "<= 400 B", "500 B", False),),
    )
