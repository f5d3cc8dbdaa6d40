"""Cost facts: nanoseconds on one core, by kind of processor. Data, read by passes that must decide without timing.

Only ratios matter, and only roughly: a layer is kept float when the conversions at its borders cost more than its
integer kernel saves. `measured/NAME.json` is written by `python -m benchmarks.costs --write` on a processor of that
kind; the tables below start from published figures.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

MEASURED = Path(__file__).parent / "measured"


@dataclass(frozen=True)
class CostFacts:
    """Nanoseconds per unit of work; nan where nothing is known.

    float_mac, integer_mac: one multiply-add of a dense Conv, MatMul or Gemm, signed weights.
    float_depthwise_mac, integer_depthwise_mac: one multiply-add of a Conv with one input channel a group.
    convert: one element through QuantizeLinear or DequantizeLinear.
    node: fixed cost of one more node.
    unsigned_mac: one multiply-add of a dense layer with unsigned weights (U8U8).
    dynamic_mac: one multiply-add of a MatMul whose input is quantized at run time, that included.
    float_element, integer_element: one element of the result of an Add or Mul of two tensors.
    float_pointwise_mac, float_strip_mac: one multiply-add of a Conv with a kernel of one position, or longer than one
    along one of two axes only; by default that of other dense layers.
    float_weight: reading one weight that a layer uses once, as it does for a single row.
    layer: what two thinner Convs, MatMuls or Gemms in place of one take more than their multiply-adds.
    source: where the figures come from.
    """

    float_mac: float
    integer_mac: float
    float_depthwise_mac: float
    integer_depthwise_mac: float
    convert: float
    node: float
    unsigned_mac: float = math.nan
    dynamic_mac: float = math.nan
    float_element: float = math.nan
    integer_element: float = math.nan
    float_pointwise_mac: float = math.nan
    float_strip_mac: float = math.nan
    float_weight: float = math.nan
    layer: float = math.nan
    source: str = ""

    def known(self, name: str, otherwise: float) -> float:
        """The figure called `name`, or `otherwise` where a table has none."""
        value = float(getattr(self, name))
        return otherwise if math.isnan(value) else value


def read_measured(name: str) -> CostFacts | None:
    """The table that `benchmarks.costs` wrote for the target `name`; None when there is none."""
    path = MEASURED / f"{name}.json"
    if not path.is_file():
        return None
    table = json.loads(path.read_text(encoding="utf-8"))
    facts = table["facts"]
    numbers = {field.name: float(facts[field.name]) for field in fields(CostFacts) if field.name in facts}
    made = table["provenance"]
    return CostFacts(**numbers, source=f"benchmarks.costs on {made['cpu']}, onnxruntime {made['onnxruntime']}")


# float32 Conv 3x3 64@56 at 43 GMAC/s, 1x1 256@14 at 35, depthwise 3x3 at 10, MatMul 128x768x768 at 38; with U8S8
# kernels 0.53-0.55 of the time, with U8U8 0.66-0.88, depthwise 1.06, dynamic MatMul 0.51; one element of a conversion
# 0.1-0.4 ns. A 1x1 convolution at 35 GMAC/s, 3x1 and 1x3 at 1.08-1.2 of the time of 3x3 a multiply-add, MatMul
# 1x768x3072 at 0.106 ns a weight; a MatMul split in two took 20 to 27 us more than its multiply-adds, floor included.
AVX2 = CostFacts(
    float_mac=0.025,
    integer_mac=0.0135,
    unsigned_mac=0.0195,
    float_depthwise_mac=0.100,
    integer_depthwise_mac=0.105,
    dynamic_mac=0.0135,
    float_element=0.15,
    integer_element=0.30,
    float_pointwise_mac=0.0285,
    float_strip_mac=0.029,
    float_weight=0.106,
    layer=7000,
    convert=0.20,
    node=1500,
    source="onnxruntime 1.32 on AMD Zen 3 (AVX2, no VNNI), one thread",
)

# What VNNI promises beside AVX2: for another runtime than onnxruntime, whose depthwise kernels it does not share.
DOT_PRODUCT = CostFacts(
    float_mac=0.014,
    integer_mac=0.005,
    unsigned_mac=0.005,
    float_depthwise_mac=0.080,
    integer_depthwise_mac=0.070,
    dynamic_mac=0.005,
    float_element=0.15,
    integer_element=0.30,
    float_pointwise_mac=0.015,
    float_strip_mac=0.014,
    float_weight=0.100,
    layer=4000,
    convert=0.15,
    node=1500,
    source="published ratios of VNNI to AVX2",
)

# Cores with SDOT: four 8-bit multiply-adds for each of float (Arm's architecture manual); published speed-ups of whole
# networks are 2 to 3.
NEON_DOT = CostFacts(
    float_mac=0.040,
    integer_mac=0.013,
    unsigned_mac=0.013,
    float_depthwise_mac=0.150,
    integer_depthwise_mac=0.110,
    dynamic_mac=0.014,
    float_element=0.25,
    integer_element=0.50,
    float_pointwise_mac=0.043,
    float_strip_mac=0.045,
    float_weight=0.200,
    layer=7000,
    convert=0.30,
    node=2000,
    source="published ratios of ARM64 cores with dot product instructions",
)

# WebAssembly SIMD, 128 bits: the kernels widen to 16 bits and take pairs (i32x4.dot_i16x8_s), twice float's four lanes
# at best (`mlas/lib/qgemm_kernel_wasmsimd.cpp`); U8S8 and U8U8 are one kernel.
WASM_SIMD = CostFacts(
    float_mac=0.100,
    integer_mac=0.065,
    unsigned_mac=0.065,
    float_depthwise_mac=0.250,
    integer_depthwise_mac=0.250,
    dynamic_mac=0.067,
    float_element=0.40,
    integer_element=1.00,
    float_pointwise_mac=0.110,
    float_strip_mac=0.115,
    float_weight=0.250,
    layer=15000,
    convert=0.80,
    node=4000,
    source="lanes of WebAssembly SIMD instructions",
)

# Tensor cores: 8-bit twice the rate of half precision (data sheets of A100 and H100), depthwise without them. The
# builder fuses Q and DQ into their neighbours, so that a border costs next to nothing and a node nothing; one more
# layer is one more kernel to start, a few microseconds, and weights come from memory at 2 TB/s.
TENSOR_CORES = CostFacts(
    float_mac=0.000020,
    integer_mac=0.000010,
    unsigned_mac=0.000010,
    float_depthwise_mac=0.0005,
    integer_depthwise_mac=0.0005,
    dynamic_mac=0.000010,
    float_element=0.0020,
    integer_element=0.0010,
    float_pointwise_mac=0.000025,
    float_strip_mac=0.000040,
    float_weight=0.0010,
    layer=3000,
    convert=0.00001,
    node=0,
    source="peak rates in NVIDIA's data sheets",
)

# A matrix unit built for 8 bits: half precision at half the rate is assumed; no figures were at hand.
HEXAGON = CostFacts(
    float_mac=0.0010,
    integer_mac=0.0005,
    unsigned_mac=0.0005,
    float_depthwise_mac=0.0100,
    integer_depthwise_mac=0.0050,
    dynamic_mac=0.0010,
    float_element=0.020,
    integer_element=0.010,
    float_pointwise_mac=0.0010,
    float_strip_mac=0.0015,
    float_weight=0.030,
    layer=3000,
    convert=0.0005,
    node=0,
    source="an assumed ratio of two",
)
