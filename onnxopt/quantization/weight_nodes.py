"""The nodes that stand in for a stored weight: what reads the codes, and what makes floats of them.

    file, per channel   Mul(Cast(codes), scales)
    file, in blocks     Reshape(Slice(Reshape(Mul(Cast(int4 codes), Cast(float16 scales))))), Slice only where blocks
                        end with padding
    kernel              MatMul(x, DequantizeLinear(codes))  or  com.microsoft.MatMulNBits(x, codes)
    rows of a table     Mul(Cast(Gather(codes)), Gather(scales)); 4-bit codes are gathered as pairs, then taken apart

Operator set 21 has a 4-bit type. Below it two codes share a byte, the first half of a weight in the low bits, the
second in the high ones, and shifts take them apart.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxopt.model import Constant, Graph, Model, Node, Variable
from onnxopt.numerics.blocks import Blocks
from onnxopt.quantization.storage import Stored
from onnxopt.quantization.writer import FLOAT, QdqWriter

MICROSOFT = "com.microsoft"
# Where 4-bit tensors and DequantizeLinear with blocks begin (onnx, docs/Changelog.md and docs/IR.md).
_NATIVE_OPSET, _NATIVE_IR = 21, 10
# Sums of 8-bit products (2 to 4 would round activations to less); what a DequantizeLinear fused by the runtime gets.
_ACCURACY_LEVEL = 4
_OFFSET = 8  # what unsigned 4-bit codes have on top

Source = Variable | Constant


@dataclass(frozen=True, eq=False)
class PerChannel:
    """codes: shape of the weight. scales: float32, broadcastable to it. told: the format's name."""

    codes: Constant
    scales: Constant
    told: str

    @property
    def detail(self) -> str:
        """What a report says."""
        return self.told


@dataclass(frozen=True, eq=False)
class InBlocks:
    """codes: int4 or packed uint8, in the form of their kind. size: inputs that share a scale. how: the rounding.

    rows: codes [V, K / 2] are packed row by row, scales float32 [V, K / size], as a Gather needs them. kernel: both are
    as a kernel reads them.
    """

    codes: Constant
    scales: Constant
    size: int
    rows: bool
    kernel: bool
    how: str

    @property
    def detail(self) -> str:
        """What a report says."""
        return f"int4 in blocks of {self.size}, {self.how}"


def has_int4(model: Model) -> bool:
    """Whether the model's version of ONNX has a type of 4 bits; in older ones bytes hold two codes each."""
    return model.opset >= _NATIVE_OPSET and model.ir_version >= _NATIVE_IR


class WeightNodes:
    """Writes stored weights of one model. memory: let kernels read codes where there are such kernels."""

    def __init__(self, writer: QdqWriter, model: Model, memory: bool, block: int) -> None:
        self._writer, self._model, self._memory, self._block = writer, model, memory, block
        self._native = has_int4(model)
        self._made: dict[tuple[int, ...], Variable] = {}
        self._turned: dict[int, Constant] = {}
        self._readers: dict[int, int] = Counter(
            uid
            for body in model.bodies()
            for uid in {x.data.uid for node in body.nodes for x in node.inputs if isinstance(x, Constant)}
        )

    def kind(self, found: Stored, in_blocks: bool, tabled: bool) -> str:
        """What form the codes of one reader take; readers of one kind share them. tabled: a Gather reads them too."""
        if not in_blocks:
            return "plain"
        if self.reads_codes(found, in_blocks):
            return "kernel"
        return "rows" if tabled else "file"

    def reads_codes(self, found: Stored, in_blocks: bool) -> bool:
        """Whether a kernel is to read the codes of this weight, so that they are all that memory holds."""
        node = found.node
        if not self._memory or (in_blocks and len(found.view.grid) != 2) or (not in_blocks and len(found.kept) != 1):
            return False
        if self._readers[found.weight.data.uid] > 1 and (self._native or not in_blocks):
            return False  # the runtime packs codes for the first body that reads them, and finds none for the next
        if node.op in ("Conv", "ConvTranspose"):
            return not in_blocks
        if node.op == "Gemm":
            wanted = {"alpha": 1.0, "beta": 1.0, "transA": 0}
            fits = all(node.attrs.get(name, value) == value for name, value in wanted.items())
            fits &= not in_blocks or self._native or _bias_fits(node, int(found.weight.data.size) // found.view.inputs)
        else:
            fits = node.op == "MatMul" and found.at == 1
        power_of_two = self._block >= 16 and self._block & (self._block - 1) == 0
        return fits and (not in_blocks or (power_of_two and found.view.inputs % self._block == 0))

    # codes as constants

    def in_blocks(self, found: Stored, blocks: Blocks, kind: str, how: str) -> InBlocks:
        """Constants of codes [R, K] with scales [R, K / size] in the form of this kind."""
        if kind == "rows":
            codes, scales = pack_halves(blocks.codes), blocks.scales
        elif kind == "kernel" and self._native:
            codes, scales = blocks.codes.T.astype(ml_dtypes.int4), blocks.scales.T
        elif kind == "kernel":
            codes, scales = _pack_neighbours(blocks), blocks.scales.reshape(-1)
        else:
            padded = np.pad(blocks.codes, ((0, 0), (0, blocks.scales.shape[1] * blocks.size - found.view.inputs)))
            cut = found.view.cut(padded, blocks.size)
            codes = cut.astype(ml_dtypes.int4) if self._native else pack_halves(cut.reshape(1, -1))[0]
            scales = _as_half(found.view.cut(blocks.scales, 1))
        name = found.weight.name
        return InBlocks(
            self._writer.constant(f"{name}_codes", np.ascontiguousarray(codes)),
            self._writer.constant(f"{name}_scale", np.ascontiguousarray(scales)),
            blocks.size,
            kind == "rows",
            kind == "kernel",
            how,
        )

    # nodes

    def store(self, found: Stored, coded: PerChannel | InBlocks, between: bool) -> None:
        """Let the reader take the codes. between: it stands between tensors of codes (`storage.between_codes`)."""
        if found.node.op == "Gather":
            self._rows(found, coded)
        elif between or (isinstance(coded, PerChannel) and self.reads_codes(found, False)):
            assert isinstance(coded, PerChannel)
            self._dequantized(found, coded, turned=not between)
        elif isinstance(coded, InBlocks) and coded.kernel:
            self._kernel(found, coded)
        else:
            self._writer.set_input(found.node, found.at, self._floats(found, coded), found.body)

    def _floats(self, found: Stored, coded: PerChannel | InBlocks) -> Variable:
        """The weight as floats, which the runtime computes when it loads the model; one chain a body."""
        body, view = found.body, found.view
        key = (id(coded.codes), id(coded.scales), id(body), hash(view))
        if key in self._made:
            return self._made[key]
        name = coded.codes.name
        if isinstance(coded, PerChannel):
            values = self._cast(body, coded.codes, f"{name}_cast")
            self._made[key] = self._node(body, "Mul", [values, coded.scales], f"{name}_scaled")
            return self._made[key]
        cut = view.cut_shape(coded.size)
        packed = coded.rows or not self._native
        values = self._unpacked(body, coded, cut) if packed else self._cast(body, coded.codes, f"{name}_cast")
        factors = self._factors(body, coded)
        tensor = self._node(body, "Mul", [values, factors], f"{name}_scaled")
        padded = (*view.grid[: view.axis], cut[view.axis] * coded.size, *view.grid[view.axis + 1 :])
        if padded != view.grid:
            tensor = self._reshape(body, tensor, padded, f"{name}_grid")
            places = {"start": 0, "end": view.inputs, "axis": view.axis}
            bounds = [self._integers(f"{name}_{what}", [number]) for what, number in places.items()]
            tensor = self._node(body, "Slice", [tensor, *bounds], f"{name}_cut")
        self._made[key] = self._reshape(body, tensor, view.shape, f"{name}_weight")
        return self._made[key]

    def _factors(self, body: Graph, coded: InBlocks) -> Source:
        """Scales that broadcast to codes cut in blocks."""
        if not coded.rows and coded.scales.dtype == np.float32:
            return coded.scales
        if not coded.rows:
            return self._cast(body, coded.scales, f"{coded.scales.name}_cast")
        return self._reshape(body, coded.scales, (*coded.scales.shape, 1), f"{coded.scales.name}_blocks")

    def _unpacked(self, body: Graph, coded: InBlocks, cut: tuple[int, ...]) -> Variable:
        """Float codes of packed ones, in the shape `cut`."""
        name = coded.codes.name
        joined = self._nibbles(body, coded.codes, -1, name)
        shaped = self._reshape(body, joined, cut, f"{name}_blocks")
        return self._node(body, "Sub", [self._cast(body, shaped, f"{name}_cast"), self._offset()], f"{name}_signed")

    def _nibbles(self, body: Graph, packed: Source, axis: int, name: str) -> Variable:
        """Bytes taken apart: the low halves, then the high ones, along `axis`."""
        four = self._number("four", np.array(4, np.uint8))
        raised = self._node(body, "BitShift", [packed, four], f"{name}_raised", direction="LEFT")
        low = self._node(body, "BitShift", [raised, four], f"{name}_low", direction="RIGHT")
        high = self._node(body, "BitShift", [packed, four], f"{name}_high", direction="RIGHT")
        return self._node(body, "Concat", [low, high], f"{name}_nibbles", axis=axis)

    def _dequantized(self, found: Stored, coded: PerChannel, turned: bool) -> None:
        """DequantizeLinear per channel. turned: give a Gemm its weight untransposed, which is what has a kernel."""
        node, codes, axis = found.node, coded.codes, found.kept[0]
        if turned and node.op == "Gemm":
            if node.attrs.get("transB", 0):
                codes, axis = self._transposed(codes), 1
            self._plain_gemm(node, found.body)
        vector = self._flat(coded.scales)
        zeros = self._number(f"zeros_{vector.values.size}", np.zeros(vector.values.size, np.int8))
        self._writer.set_input(
            node, found.at, self._writer.dequantize(found.body, codes, vector, zeros, axis), found.body
        )

    def _kernel(self, found: Stored, coded: InBlocks) -> None:
        node, body = found.node, found.body
        if self._native:
            key = (id(coded.codes), id(body))
            if key not in self._made:
                self._made[key] = self._node(
                    body,
                    "DequantizeLinear",
                    [coded.codes, coded.scales],
                    f"{coded.codes.name}_dequantized",
                    axis=0,
                    block_size=coded.size,
                )
            if node.op == "Gemm":
                self._plain_gemm(node, body)
            self._writer.set_input(node, found.at, self._made[key], body)
            return
        bias = node.inputs[2] if node.op == "Gemm" and len(node.inputs) > 2 else Variable.empty()
        outputs = int(found.weight.data.size) // found.view.inputs
        sizes = {"K": found.view.inputs, "N": outputs, "bits": 4, "block_size": coded.size}
        inputs: list[Source] = [node.inputs[0], coded.codes, coded.scales]
        if isinstance(bias, Constant):
            bias = self._flat(bias)
        if not bias.is_empty():
            inputs += [Variable.empty(), Variable.empty(), bias]
        self._writer.replace(
            node, body, "MatMulNBits", inputs, domain=MICROSOFT, accuracy_level=_ACCURACY_LEVEL, **sizes
        )
        if MICROSOFT not in self._model.opset_imports:
            self._model.import_opset(MICROSOFT, 1)

    def _plain_gemm(self, node: Node, body: Graph) -> None:
        """A Gemm as the runtime's kernel for codes takes it: weight [K, N], bias [N] where it is one row."""
        node.attrs["transB"] = 0
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if isinstance(bias, Constant) and len(bias.shape) > 1 and bias.data.size == bias.shape[-1]:
            self._writer.set_input(node, 2, self._flat(bias), body)

    def _rows(self, found: Stored, coded: PerChannel | InBlocks) -> None:
        node, body = found.node, found.body
        indices, output = node.inputs[1], node.outputs[0]
        name = output.name
        picked = self._node(body, "Gather", [coded.codes, indices], f"{name}_rows", axis=0)
        factors = self._node(body, "Gather", [coded.scales, indices], f"{name}_scales", axis=0)
        if isinstance(coded, PerChannel):
            values = self._cast(body, picked, f"{name}_cast")
            self._writer.replace(node, body, "Mul", [values, factors])
            return
        blocks = found.view.inputs // coded.size
        codes = self._cast(body, self._nibbles(body, picked, -1, name), f"{name}_cast")
        signed = self._node(body, "Sub", [codes, self._offset()], f"{name}_signed")
        cut = self._reshape(body, signed, (-1, blocks, coded.size), f"{name}_blocks")
        spread = self._reshape(body, factors, (-1, blocks, 1), f"{name}_factors")
        scaled = self._node(body, "Mul", [cut, spread], f"{name}_scaled")
        ids = self._node(body, "Shape", [indices], f"{name}_ids")
        width = self._integers(f"{name}_width", list(found.weight.shape[1:]))
        target = self._node(body, "Concat", [ids, width], f"{name}_shape", axis=0)
        self._writer.replace(node, body, "Reshape", [scaled, target])

    # pieces

    def _node(self, body: Graph, op: str, inputs: list[Source], base: str, **attrs: object) -> Variable:
        return self._writer.node(body, op, inputs, base, **attrs)

    def _cast(self, body: Graph, tensor: Source, base: str) -> Variable:
        return self._node(body, "Cast", [tensor], base, to=FLOAT)

    def _reshape(self, body: Graph, tensor: Source, shape: tuple[int, ...], base: str) -> Variable:
        return self._node(body, "Reshape", [tensor, self._integers(f"{base}_target", list(shape))], base)

    def _integers(self, base: str, numbers: list[int]) -> Constant:
        return self._writer.shared(base, np.array(numbers, np.int64))

    def _number(self, base: str, value: npt.NDArray[Any]) -> Constant:
        return self._writer.shared(base, value)

    def _offset(self) -> Constant:
        return self._number("code_offset", np.array(_OFFSET, np.float32))

    def _flat(self, constant: Constant) -> Constant:
        return self._writer.shared(f"{constant.name}_flat", constant.values.reshape(-1))

    def _transposed(self, codes: Constant) -> Constant:
        if id(codes) not in self._turned:
            self._turned[id(codes)] = self._writer.constant(
                f"{codes.name}_turned", np.ascontiguousarray(codes.values.T)
            )
        return self._turned[id(codes)]


def _bias_fits(gemm: Node, outputs: int) -> bool:
    """Whether the bias of a Gemm, if any, is what MatMulNBits takes: one number for each output."""
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else Variable.empty()
    if isinstance(bias, Constant):
        return bool(bias.data.size == outputs and bias.shape[-1] == outputs)
    return bias.is_empty() or list(bias.shape or ()) == [outputs]


def _as_half(scales: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Scales as float16 where that is exact: they were rounded so first, unless they are too small for it."""
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), scales) else scales


def pack_halves(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """[R, 2 n] signed 4-bit codes as [R, n] bytes: codes 0..n-1 of a row in the low bits, n.. in the high ones."""
    unsigned = (codes.astype(np.int16) + _OFFSET).astype(np.uint8)
    half = codes.shape[1] // 2
    return np.asarray(unsigned[:, :half] | (unsigned[:, half:] << 4), np.uint8)


def _pack_neighbours(blocks: Blocks) -> npt.NDArray[np.uint8]:
    """[N, blocks, size / 2] bytes, the even input of each pair in the low bits (contrib operator MatMulNBits)."""
    unsigned = (blocks.codes.astype(np.int16) + _OFFSET).astype(np.uint8)
    pairs = unsigned.reshape(len(unsigned), -1, blocks.size // 2, 2)
    return np.asarray(pairs[..., 0] | (pairs[..., 1] << 4), np.uint8)
