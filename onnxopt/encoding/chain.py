"""The nodes that compute a tensor from its stored form: standard operators, which the runtime folds at load.

    palette     Gather(codebook, Cast(codes))                       codes: uint8, uint4 (operator set 21), uint2 (25)
      packed    Reshape(BitShift(BitShift(bytes, left), right))     below these sets, and for the parts of other widths
      groups    Gather(codebooks, Add(Cast(codes), offsets))
      vectors   Reshape(Gather(codebook [entries, width], ...))
    bitmask     Reshape(Gather([0, values], Mul(CumSum(bits), bits)))
      codes     a palette whose codes are computed so, from those that are not 0

Nothing here computes with floats: values are moved, and what is computed are integers. So the tensor is equal bit for
bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxopt.encoding.forms import Masked, MaskedPalette, Palette
from onnxopt.encoding.packing import native, pack, parts
from onnxopt.graph import Names
from onnxopt.graph.operators import opset_of
from onnxopt.model import Constant, Graph, Model, Node, TensorData, Variable

_INT32 = 6  # TensorProto.INT32
# Where BitShift and CumSum begin.
PACKED_OPSET = 11
# Where Reshape reads its shape from an input.
_RESHAPE_OPSET = 5

Source = Variable | Constant
# The forms that are written as nodes.
Nodes = Palette | Masked | MaskedPalette


def obstacle(form: Nodes, opset: int) -> str | None:
    """Why a form can't be written in an operator set, None where it can."""
    kind, needed = "a palette", 1
    if isinstance(form, (Masked, MaskedPalette)):
        kind, needed = "a bitmask", PACKED_OPSET
    elif form.width > 1:
        kind, needed = "a palette of vectors", _RESHAPE_OPSET
    if opset >= needed:
        return None
    return f"{kind} needs operator set {needed}, the model has {opset}: convert it first with convert_opset"


class Chains:
    """Writes stored forms into the bodies of one model."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._names = Names(model)
        self._shared: dict[tuple[int, bytes, bytes, bytes], Constant] = {}

    def write(self, constant: Constant, form: Nodes, body: Graph) -> list[Node]:
        """Nodes for `body` whose last one makes the values of `constant`; every reader reads them from there on.

        The tensor keeps the constant's name. The caller puts the nodes where they belong.
        """
        nodes = _Nodes(self, constant.name, body, (opset_of(body), self._model.ir_version))
        if isinstance(form, Masked):
            made = nodes.masked(form)
        elif isinstance(form, Palette):
            made = nodes.palette(form)
        else:
            made = nodes.palette(form.palette, masked=True)
        made.name = constant.name
        made.dtype, made.shape = constant.dtype, list(constant.shape)
        return nodes.made

    def constant(self, base: str, values: Any) -> Constant:
        """A new constant under a free name."""
        return Constant(self._names.tensor(base), TensorData.from_array(values))

    def shared(self, body: Graph, base: str, values: Any) -> Constant:
        """A small constant of these values, one in a body."""
        key = (id(body), str(values.dtype).encode(), str(values.shape).encode(), values.tobytes())
        if key not in self._shared:
            self._shared[key] = self.constant(base, values)
        return self._shared[key]

    def tensor(self, base: str) -> Variable:
        """A new tensor under a free name."""
        return Variable(self._names.tensor(base))

    def node_name(self, base: str) -> str:
        """A free name for a node."""
        return self._names.node(base)


class _Nodes:
    """The nodes of one tensor."""

    def __init__(self, chains: Chains, base: str, body: Graph, versions: tuple[int, int]) -> None:
        self.chains, self.base, self.body = chains, base, body
        self.opset, self.ir_version = versions
        self.made: list[Node] = []

    def palette(self, form: Palette, masked: bool = False) -> Variable:
        """Makes the tensor of a palette. masked: of its indices only those that are not 0 are stored."""
        indices: Source = self._masked_codes(form) if masked else self._codes(form.indices, form.bits)
        if form.groups > 1:
            offsets = self.chains.shared(self.body, f"{self.base}_offsets", form.offsets)
            indices = self._node("Add", [indices, offsets], "places")
        flat = form.codebook.reshape(-1) if form.width == 1 else form.codebook.reshape(-1, form.width)
        codebook = self.chains.constant(f"{self.base}_codebook", np.ascontiguousarray(flat))
        found = self._node("Gather", [codebook, indices], "decoded", axis=0)
        return found if form.width == 1 else self._reshape(found, form.shape, "vectors")

    def masked(self, form: Masked) -> Variable:
        """Makes the tensor of a mask and the values that it keeps."""
        values = np.concatenate([np.zeros(1, form.kept.dtype), form.kept])
        return self._spread(form.mask, self.chains.constant(f"{self.base}_values", values), form.shape)

    def _masked_codes(self, form: Palette) -> Source:
        """The indices as int32, from a mask and those that are not 0."""
        mask = form.indices.reshape(-1) != 0
        kept = self._codes(form.indices.reshape(-1)[mask], form.bits)
        zero = self._shared("zero", np.zeros(1, np.int32))
        return self._spread(mask, self._node("Concat", [zero, kept], "kept", axis=0), form.indices.shape)

    def _spread(self, mask: Any, kept: Source, shape: Sequence[int]) -> Variable:
        """A tensor of `shape`: elements of `kept` where the mask is set, and the zero in front of them elsewhere."""
        bits = self._node("Cast", [self._unpacked(mask.view(np.uint8), 1, "mask")], "bits", to=_INT32)
        counted = self._node("CumSum", [bits, self._shared("axis", np.array(0, np.int64))], "counted")
        places = self._node("Mul", [counted, bits], "places")
        found = self._node("Gather", [kept, places], "spread", axis=0)
        return self._reshape(found, tuple(shape), "decoded")

    def _codes(self, indices: Any, bits: int) -> Source:
        """Indices as int32."""
        widths = parts(bits) if self.opset >= PACKED_OPSET else (8,)
        below = sum(widths)
        total: Source | None = None
        for width in widths:
            below -= width
            codes = (indices >> below).astype(np.uint8) & np.uint8((1 << width) - 1)
            part: Source = self._part(codes, width, indices.shape)
            part = self._node("Cast", [part], "indices", to=_INT32)
            if below:
                part = self._node("Mul", [part, self._shared("weight", np.array(1 << below, np.int32))], "raised")
            total = part if total is None else self._node("Add", [total, part], "joined")
        assert total is not None
        return total

    def _part(self, codes: Any, width: int, shape: Sequence[int]) -> Source:
        """Codes of one width: a constant of a type that has it, or bytes taken apart."""
        dtype = native(width, self.opset, self.ir_version)
        if dtype is not None:
            return self.chains.constant(f"{self.base}_codes", codes.astype(dtype))
        return self._reshape(self._unpacked(codes.reshape(-1), width, "codes"), tuple(shape), "grid")

    def _unpacked(self, codes: Any, width: int, what: str) -> Variable:
        """[n] uint8 codes from bytes that hold several."""
        each = 8 // width
        packed = self.chains.constant(f"{self.base}_{what}", pack(codes, width))
        left = np.array([8 - width - width * at for at in range(each)], np.uint8)
        right = np.array(8 - width, np.uint8)
        raised = self._node("BitShift", [packed, self._shared("left", left)], f"{what}_left", direction="LEFT")
        lone = self._node("BitShift", [raised, self._shared("right", right)], f"{what}_right", direction="RIGHT")
        flat = self._reshape(lone, (-1,), f"{what}_flat")
        if codes.size % each == 0:
            return flat
        start, end = (np.array([number], np.int64) for number in (0, codes.size))
        return self._node("Slice", [flat, self._shared("start", start), self._shared("end", end)], f"{what}_cut")

    def _reshape(self, tensor: Source, shape: tuple[int, ...], what: str) -> Variable:
        return self._node("Reshape", [tensor, self._shared("shape", np.array(shape, np.int64))], what)

    def _shared(self, what: str, values: Any) -> Constant:
        return self.chains.shared(self.body, f"{self.base}_{what}", values)

    def _node(self, op: str, inputs: list[Any], what: str, **attrs: object) -> Variable:
        output = self.chains.tensor(f"{self.base}_{what}")
        node = Node(op=op, name=self.chains.node_name(f"{self.base}_{what}_{op}"), attrs=attrs)
        node.inputs, node.outputs = inputs, [output]
        self.made.append(node)
        return output
