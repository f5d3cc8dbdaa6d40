"""Cost facts: nanoseconds on one core, by kind of processor. Data, read by passes that must decide without timing.

Measured with onnxruntime's CPU provider, one thread (1 GMAC = 10^9 multiply-adds): float32 Conv 3x3 64@56 at 43
GMAC/s, 1x1 256@14 at 35, depthwise 3x3 at 10, MatMul 128x768x768 at 38; with integer kernels 0.53-0.55 of the time,
depthwise 1.06 of it; quantizing or dequantizing one element 0.1-0.4 ns. Only ratios matter, and only roughly: a layer
is kept float when the conversions at its borders cost more than its integer kernel saves.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class CostFacts:
    """Nanoseconds per unit of work.

    float_mac, integer_mac: one multiply-add of a dense Conv, MatMul or Gemm.
    float_depthwise_mac, integer_depthwise_mac: one multiply-add of a Conv with one input channel a group.
    convert: one element through QuantizeLinear or DequantizeLinear.
    node: fixed cost of one more node.
    """

    float_mac: float
    integer_mac: float
    float_depthwise_mac: float
    integer_depthwise_mac: float
    convert: float
    node: float


AVX2 = CostFacts(
    float_mac=0.025, integer_mac=0.0135, float_depthwise_mac=0.100, integer_depthwise_mac=0.105, convert=0.20, node=1500
)
DOT_PRODUCT = CostFacts(
    float_mac=0.014, integer_mac=0.005, float_depthwise_mac=0.080, integer_depthwise_mac=0.070, convert=0.15, node=1500
)
NEON_DOT = CostFacts(
    float_mac=0.040, integer_mac=0.013, float_depthwise_mac=0.150, integer_depthwise_mac=0.110, convert=0.30, node=2000
)
