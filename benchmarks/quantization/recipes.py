"""Recipes of other tools; here run those of onnxruntime's own quantization.

    python -m benchmarks.quantization.recipes RECIPE SOURCE FEEDS OUT SAMPLES

makes one model in a process of its own and prints its seconds as JSON. RECIPE is one of ORT_PEERS, or "ready" (operator
set 17 where the model is below 13, then onnxruntime's preprocessing: what all peers start from). FEEDS is a folder with
one .npz (input name -> array) a sample.

Static recipes of onnxruntime, each with every calibrator: "u8s8" is what its documentation recommends for x86 (QDQ, U8
activations, S8 weights per channel), "default" leaves all settings alone, "7bit" is u8s8 with reduce_range. "dynamic"
is quantize_dynamic with S8 weights per channel on MatMul, Gemm and LSTM.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import onnx

from benchmarks.ours import feeds_in

CALIBRATORS = ("minmax", "entropy", "percentile", "distribution")
ORT_PEERS = (
    "u8s8",
    *(f"u8s8-{name}" for name in CALIBRATORS[1:]),
    "7bit",
    "default",
    *(f"default-{name}" for name in CALIBRATORS[1:]),
    "dynamic",
)
NNCF_PEERS = ("nncf-fast", "nncf-full", "nncf-transformer")
PEERS = (*ORT_PEERS, *NNCF_PEERS)
# These keep every value of every tensor of all samples.
HISTOGRAMS = tuple(f"{base}-{name}" for base in ("u8s8", "default") for name in CALIBRATORS[1:])


def ready(source: Path, out: Path) -> None:
    """The float model as onnxruntime's tools want it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    proto = onnx.load(source)
    if next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")) < 13:
        proto = onnx.version_converter.convert_version(proto, 17)
        source = out.with_suffix(".raised.onnx")
        onnx.save(proto, source)
    try:
        quant_pre_process(str(source), str(out))
    except Exception:  # noqa: BLE001  symbolic shape inference fails on some models; onnxruntime's advice is to skip it
        quant_pre_process(str(source), str(out), skip_symbolic_shape=True)


def static(recipe: str, source: Path, feeds: Path, out: Path, samples: int) -> None:
    """quantize_static, recommended or default settings, one calibrator."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.samples = iter(itertools.islice(feeds_in(feeds, source), samples))

        def get_next(self) -> dict[str, Any] | None:
            found = next(self.samples, None)
            return None if found is None else found.inputs

    base, _, calibrator = recipe.partition("-")
    methods = {method.name.lower(): method for method in CalibrationMethod}
    settings: dict[str, Any] = {}
    if base != "default":
        settings = {
            "quant_format": QuantFormat.QDQ,
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QInt8,
            "per_channel": True,
            "reduce_range": base == "7bit",
        }
    quantize(str(source), str(out), Reader(), calibrate_method=methods[calibrator or "minmax"], **settings)


def dynamic(source: Path, out: Path) -> None:
    """quantize_dynamic, in bodies of If and Loop too."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    nodes = onnx.load(source, load_external_data=False).graph.node
    nested = any(attribute.HasField("g") or attribute.graphs for node in nodes for attribute in node.attribute)
    quantize_dynamic(
        str(source),
        str(out),
        op_types_to_quantize=["MatMul", "Gemm", "LSTM"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"EnableSubgraph": True} if nested else None,
    )


def main() -> int:
    """Make one model."""
    recipe, *paths, count = sys.argv[1:]
    source, feeds, out = map(Path, paths)
    started = time.perf_counter()
    if recipe == "ready":
        ready(source, out)
    elif recipe == "dynamic":
        dynamic(source, out)
    else:
        static(recipe, source, feeds, out, int(count))
    print(json.dumps({"seconds": time.perf_counter() - started}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
