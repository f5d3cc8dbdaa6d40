"""Where the result will run: number formats, saturation, operators, and the cost facts that say what pays.

A pass asks the target, never its name. Named targets give the same bytes on every machine. `auto` reads this machine's
processor: its architecture and, on x86, whether it has VNNI. With VNNI it takes the costs of `x86-vnni` but keeps the
weights of `x86`, which saturate nowhere: a file made on a build machine with VNNI is right on a laptop without. Only
`x86-vnni`, asked for by name, uses the whole range of weights.
"""

from dataclasses import dataclass, replace

import numpy as np

from onnxopt.target import cpu
from onnxopt.target.costs import (
    AVX2,
    DOT_PRODUCT,
    HEXAGON,
    NEON_DOT,
    TENSOR_CORES,
    WASM_SIMD,
    CostFacts,
    read_measured,
)

__all__ = ["TARGETS", "CostFacts", "Target", "resolve"]

_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})


@dataclass(frozen=True)
class Target:
    """A kind of processor and the runtime on it. Weights are symmetric int8, biases int32.

    activation: integer type of activations.
    symmetric: the zero-point of activations must be 0.
    per_channel: layers whose weight takes a scale per output channel; the others take one for the whole weight.
    saturates: U8S8 products may overflow 16-bit pair sums (`onnxopt.numerics.saturation`).
    unsigned_weights: uint8 weights with zero-point 128 have an integer kernel too, and it never saturates.
    integer_kernels: the kernels are those of onnxruntime's CPU provider, and what keeps it from fusing is avoided.
    architectures: machines on which this onnxruntime is the target's, so that its optimized graph shows the kernels.
    float_outputs: layers that may write float where nobody wants codes, besides what onnxruntime's kernels may.
    float_operators: operators that carry codes in onnxruntime but not here.
    folds: Cast and Mul of a constant are computed once, when the model is loaded.
    half_compute: float16 is the type to compute in, not only one to store weights in.
    channels: layers run best at multiples of so many channels.
    costs: nanoseconds of the work that passes weigh against each other. measured: by `benchmarks.costs`, or by hand in
    onnxruntime, on such a processor; otherwise from published ratios.
    """

    name: str
    summary: str
    costs: CostFacts
    measured: bool
    activation: np.dtype[np.generic]
    saturates: bool
    symmetric: bool = False
    per_channel: frozenset[str] = _LAYERS
    unsigned_weights: bool = False
    integer_kernels: bool = True
    architectures: frozenset[str] = frozenset()
    float_outputs: frozenset[str] = frozenset()
    float_operators: frozenset[str] = frozenset()
    folds: bool = True
    half_compute: bool = False
    channels: int = 8

    @property
    def runs_here(self) -> bool:
        """Whether the runtime on this machine is the target's; of others nothing is known but what is published."""
        return cpu.machine() in self.architectures


_MEASURED = {name: read_measured(name) for name in ("x86", "x86-vnni", "arm64")}

_X86 = Target(
    "x86",
    "any x86-64 with AVX2; safe without VNNI",
    costs=_MEASURED["x86"] or AVX2,
    measured=True,
    activation=np.dtype(np.uint8),
    # vpmaddubsw adds two products in 16 bits (onnxruntime, `mlas/lib/x86_64/QgemmU8S8KernelAvx2.S`); the U8U8 kernel
    # widens to 16 bits first
    saturates=True,
    unsigned_weights=True,
    architectures=frozenset({"x86_64", "amd64"}),
)
_X86_VNNI = replace(
    _X86,
    name="x86-vnni",
    summary="x86-64 with AVX512-VNNI or AVX-VNNI",
    costs=_MEASURED["x86-vnni"] or DOT_PRODUCT,
    measured=_MEASURED["x86-vnni"] is not None,
    saturates=False,  # vpdpbusd adds four products in 32 bits
)

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        _X86,
        _X86_VNNI,
        Target(
            "arm64",
            "ARM64 with dot product instructions",
            costs=_MEASURED["arm64"] or NEON_DOT,
            measured=_MEASURED["arm64"] is not None,
            activation=np.dtype(np.int8),  # onnxruntime's advice for ARM: S8S8, which SDOT multiplies
            saturates=False,
            architectures=frozenset({"aarch64", "arm64"}),
        ),
        Target(
            "tensorrt",
            "NVIDIA GPUs by TensorRT",
            costs=TENSOR_CORES,
            measured=False,
            # TensorRT, "Working with Quantized Types": symmetric int8 only; a zero-point other than 0 is refused
            activation=np.dtype(np.int8),
            symmetric=True,
            saturates=False,
            integer_kernels=False,
            # TensorRT, "Explicit Quantization": inputs of weighted layers are quantized, outputs where it pays
            float_outputs=frozenset({"Conv"}),
            # what NVIDIA's Model Optimizer quantizes in ONNX: no activation functions but Relu and Clip
            float_operators=frozenset({"LeakyRelu", "Sigmoid", "Softmax"}),
            folds=False,  # int8 constants are known to it behind DequantizeLinear only
            half_compute=True,  # a strongly typed network computes in the types of the file
            channels=32,  # int8 tensor cores take channels in vectors of 32
        ),
        Target(
            "openvino",
            "Intel CPUs and GPUs by OpenVINO",
            costs=DOT_PRODUCT,
            measured=False,
            # NNCF's mixed preset: activations asymmetric uint8, weights symmetric int8 per channel
            activation=np.dtype(np.uint8),
            # OpenVINO, "Saturation (overflow) Issue Workaround": sums of SSE, AVX2 and AVX-512 without VNNI overflow
            saturates=True,
            integer_kernels=False,
            float_outputs=frozenset({"Conv"}),
            # the low precision transformations have no Sigmoid and no Softmax
            float_operators=frozenset({"Sigmoid", "Softmax"}),
            folds=False,  # weights behind a conversion are kept compressed
            half_compute=False,  # the device chooses: the GPU computes in half precision whatever the file says
            channels=16,  # blocked layout nChw16c
        ),
        Target(
            "qnn",
            "Qualcomm's Hexagon by onnxruntime's QNN provider",
            costs=HEXAGON,
            measured=False,
            # get_qnn_qdq_config of onnxruntime's quantization tool: uint8 activations, asymmetric
            activation=np.dtype(np.uint8),
            saturates=False,
            # scales per channel are for symmetric weights of convolutions; MatMul and Gemm take one
            per_channel=frozenset({"Conv"}),
            integer_kernels=False,
            half_compute=True,  # its floating point is half precision
            channels=32,  # vectors of 32 channels
        ),
        Target(
            "web",
            "browsers by onnxruntime-web, WebAssembly",
            costs=WASM_SIMD,
            measured=False,
            activation=np.dtype(np.uint8),
            # i32x4.dot_i16x8_s widens first; the relaxed kernel is taken only where the browser's instruction was found
            # to multiply unsigned by signed and add in 32 bits (`mlas/lib/qgemm_kernel_wasmrelaxedsimd.cpp`, HasUSDot)
            saturates=False,
            unsigned_weights=True,
            half_compute=False,  # WebAssembly has no half precision; WebGPU may lack it, and runs no 8-bit kernels
        ),
    )
}


def resolve(target: "str | Target | None" = "auto", machine: str | None = None, flags: str | None = None) -> Target:
    """The target called `target`; `auto` (or None) follows the processor.

    machine, flags: its architecture and the text of its flags; this machine's where both are None, no flags where only
    flags is None. An unknown architecture gets `x86`, whose files are right everywhere. Raises ValueError for an
    unknown name.
    """
    if isinstance(target, Target):
        return target
    if target in (None, "auto"):
        if machine is None and flags is None:
            flags = cpu.flags()
        architecture = (machine if machine is not None else cpu.machine()).lower()
        found = next((each for each in TARGETS.values() if architecture in each.architectures), _X86)
        if found is _X86 and cpu.has_dot_product(flags or ""):
            return replace(
                found, summary="x86-64 with VNNI, and right without", costs=_X86_VNNI.costs, measured=_X86_VNNI.measured
            )
        return found
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; known: auto, {', '.join(TARGETS)}")
    return TARGETS[target]
