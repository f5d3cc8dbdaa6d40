"""Weights in 16 bits of floating point: the formats, what they can hold, and the storage form.

    w: float[...]  ── y = MatMul(x, w)

    w: float16[...]  ── Cast(to float) ── y = MatMul(x, .)        folded by the runtime when it loads the model
    ids ── Gather(table: float16) ── Cast(to float) ── y          never folded: the table stays half as large in memory

A Cast of a constant costs nothing once the model is loaded, so every large float32 weight of any operator and body is
stored so, with one Cast where the constant lives, which inner bodies read too. A table that is only gathered from is
gathered first: of 30000 x 768, 128 rows a run, that takes 0.7 to 1.1 times the time of a float32 table, and the same
holds for bfloat16; the other way round the whole table would be unfolded in memory again.

Values too large for a format, or so small that it loses their digits, are multiplied by a power of two first, which
rounds nothing, and divided by it behind the Cast: float16 then holds 29 binary orders of magnitude below the largest
value instead of those above 2**-14. The small weights of a trained network often meet its largest activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from onnxopt.graph.edit import label
from onnxopt.graph.selection import Selection
from onnxopt.model import Constant, Graph, Model, Node, Variable
from onnxopt.passbase import Change, Skip
from onnxopt.quantization.coded import is_quantized
from onnxopt.quantization.writer import QdqWriter

FLOAT = int(TensorProto.FLOAT)
FLOAT32 = np.dtype(np.float32)
# Share of the bytes of all weights that the smallest may take which stay float32: first layers of networks are often
# their smallest and their most sensitive ones.
SPARED = 0.005
# Bytes that a Cast and its names take in the file, roughly.
CAST_BYTES = 160
# Up to this many elements a constant is a parameter (an epsilon, a factor), each of whose values counts.
PARAMETER = 16
# The largest relative error that a parameter may take by rounding.
PARAMETER_ERROR = 0.01
# The largest share of subnormal values, which have fewer digits, that a weight may have.
SUBNORMAL = 0.1
# Operators that turn a rounded-off zero into an infinity.
_DIVIDING = frozenset({"Div", "Log", "Mod", "Pow", "Reciprocal"})
_SHAPING = {"Resize": (1, 2), "Upsample": (1,)}


@dataclass(frozen=True)
class HalfFormat:
    """A 16-bit float: its name, numpy type, element type in the file, largest value and smallest normal one."""

    name: str
    dtype: np.dtype[np.generic]
    element: int
    largest: float
    normal: float

    def rounded(self, values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """`values` to the nearest 16-bit floats; what is too large becomes infinite."""
        with np.errstate(over="ignore", under="ignore"):
            return np.asarray(values.astype(self.dtype))


FP16 = HalfFormat("float16", np.dtype(np.float16), int(TensorProto.FLOAT16), 65504.0, 2.0**-14)
BF16 = HalfFormat(
    "bfloat16", np.dtype(ml_dtypes.bfloat16), int(TensorProto.BFLOAT16), float.fromhex("0x1.fep127"), 2.0**-126
)


def trouble(values: npt.NDArray[np.float32], form: HalfFormat, exact: bool = False) -> str | None:
    """What keeps values from a 16-bit format, as what is said of them; None when nothing does.

    exact: every single value counts, so that none may lose more than `PARAMETER_ERROR`, as epsilons and divisors do.
    """
    finite = np.isfinite(values)
    magnitude = np.abs(values[finite]).astype(np.float64)
    if not magnitude.size:
        return None
    rounded = form.rounded(magnitude).astype(np.float64)
    if not np.isfinite(rounded).all():
        return f"reaches {magnitude.max():.3g}, and {form.name} ends at {form.largest:.3g}"
    nonzero = magnitude > 0
    if exact and np.any(np.abs(rounded - magnitude) > PARAMETER_ERROR * magnitude):
        return f"holds {magnitude[nonzero].min():.1g}, which {form.name} rounds away"
    share = int(np.count_nonzero(nonzero & (magnitude < form.normal))) / max(1, int(np.count_nonzero(nonzero)))
    if not exact and share > SUBNORMAL:
        return f"has {share:.0%} of its values below {form.normal:.1g}, where {form.name} loses digits"
    return None


def shift_for(values: npt.NDArray[np.float32], form: HalfFormat) -> int:
    """The power of two by which the largest finite value comes as near to the end of the format as is safe."""
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    return 0 if largest == 0.0 else int(np.clip(np.floor(np.log2(form.largest / 2 / largest)), -100, 100))


def counts_exactly(node: Node, constant: Constant) -> bool:
    """Whether each value of a constant counts by itself for this reader, however small it is."""
    return constant.data.size <= PARAMETER or node.op in _DIVIDING


def excluded(model: Model, selection: Selection) -> set[Node]:
    """The nodes that are to stay as they are."""
    return {node for body in model.bodies() for node in body.nodes if selection.excludes(node)}


def half_already(model: Model) -> str | None:
    """A tensor that is a 16-bit float already; None where there is none."""
    narrow = (FP16.dtype, BF16.dtype)
    for body in model.bodies():
        for tensor in (*body.inputs, *body.initializers, *(out for node in body.nodes for out in node.outputs)):
            if tensor.dtype is not None and tensor.dtype in narrow:
                return str(tensor.name)
    return None


def quantized_node(model: Model) -> Node | None:
    """A node that takes or makes integer codes of floats, if there is one."""
    return next((node for body in model.bodies() for node in body.nodes if is_quantized(node)), None)


class Halves:
    """16-bit constants of one model, each made once."""

    def __init__(self, form: HalfFormat, writer: QdqWriter) -> None:
        self.form, self.writer = form, writer
        self._made: dict[tuple[Constant, int], Constant] = {}
        self._scales: dict[int, Constant] = {}

    def of(self, constant: Constant, shift: int = 0) -> Constant:
        """The constant with its values times 2**shift rounded."""
        key = constant, shift
        if key not in self._made:
            rounded = self.form.rounded(np.ldexp(constant.values, shift) if shift else constant.values)
            self._made[key] = self.writer.constant(f"{constant.name}_{self.form.name}", rounded)
        return self._made[key]

    def scale(self, shift: int) -> Constant:
        """What undoes a shift: 2**-shift, float32, no axes; one for all weights."""
        if shift not in self._scales:
            self._scales[shift] = self.writer.constant(
                f"power_{-shift}".replace("-", "minus_"), np.array(2.0**-shift, np.float32)
            )
        return self._scales[shift]


def store(model: Model, halves: Halves, left_out: set[Node]) -> tuple[list[Change], list[Skip]]:
    """Store the float32 weights that pay as 16-bit constants. left_out: nodes whose weights stay as they are."""
    homes = {id(constant): body for body in model.bodies() for constant in body.initializers}
    bodies = {node: body for body in model.bodies() for node in body.nodes}
    shown = {id(tensor) for body in model.bodies() for tensor in body.outputs}
    changes: list[Change] = []
    skipped: list[Skip] = []
    spared = _spared(model)
    for constant in [constant for body in model.bodies() for constant in body.initializers]:
        if not _large(constant) or constant in spared:
            continue
        home = homes[id(constant)]
        reason = _kept(constant, home, id(constant) in shown, left_out)
        shift, misfit = _fitting(constant, halves.form) if reason is None else (0, reason)
        if misfit is not None:
            skipped.append(Skip(f"weight {constant.name}", misfit))
        elif constant.outputs:
            rows = _store(constant, shift, home, bodies, halves)
            detail = f"{halves.form.name} rows, cast behind Gather" if rows else f"{halves.form.name} behind a Cast"
            changes.append(Change("stored", constant.name, detail + (f", times 2**{shift}" if shift else "")))
    skipped += [
        Skip(f"weight {tensor.name}", "can be overridden by an input, which is float32")
        for body in model.bodies()
        for tensor, data, _ in body.defaults
        if data.dtype == FLOAT32 and 2 * data.size > CAST_BYTES
    ]
    return changes, skipped


def _spared(model: Model) -> set[Constant]:
    """The smallest weights, up to `SPARED` of the bytes of all."""
    weights = [each for body in model.bodies() for each in body.initializers if each.dtype == FLOAT32]
    left = SPARED * sum(each.data.nbytes for each in weights)
    found: set[Constant] = set()
    for constant in sorted(weights, key=lambda each: each.data.nbytes):
        left -= constant.data.nbytes
        if left < 0:
            break
        found.add(constant)
    return found


def _large(constant: Constant) -> bool:
    size = constant.data.size
    return (constant.dtype == FLOAT32 and 2 * size > CAST_BYTES) or (
        constant.dtype == np.float64 and 6 * size > CAST_BYTES
    )


def _kept(constant: Constant, home: Graph, shown: bool, left_out: set[Node]) -> str | None:
    """Why a weight stays whatever its values are."""
    if constant.dtype != FLOAT32:
        return "is float64, which 16 bits would cut to a quarter of its digits"
    if home.function is not None:
        return "lives in a local function"
    if constant.data.sparse is not None:
        return "is stored sparse"
    if shown:
        return "is an output too, so its float values stay in the file"
    for node in constant.outputs:
        if node in left_out:
            return f"is read by {label(node)}, which is excluded"
        if node.kind[0] not in ("", "com.microsoft"):
            return f"is read by {label(node)} of domain {node.kind[0]}, which may ask for an initializer"
        if is_quantized(node):
            return f"is read by {label(node)}, whose integer kernel asks for initializers"
        if any(node.inputs[at] is constant for at in _SHAPING.get(node.op, ()) if at < len(node.inputs)):
            return f"decides sizes in {label(node)}"
    return None


def _fitting(constant: Constant, form: HalfFormat) -> tuple[int, str | None]:
    """(the shift with which a weight fits the format, 0 where it does as it is; why it never fits, or None)."""
    values: npt.NDArray[np.float32] = constant.values
    exact = any(counts_exactly(node, constant) for node in constant.outputs)
    found = trouble(values, form, exact)
    shift = 0 if found is None else shift_for(values, form)
    return shift, None if found is None else trouble(np.ldexp(values, shift), form, exact) and found


def _store(constant: Constant, shift: int, home: Graph, bodies: dict[Node, Graph], halves: Halves) -> bool:
    """Let all readers of a weight read its 16-bit form; returns whether it is gathered from before it is cast."""
    writer, half = halves.writer, halves.of(constant, shift)
    readers = [(node, at) for node in dict.fromkeys(constant.outputs) for at in _positions(node, constant)]
    if all(node.kind == ("", "Gather") and at == 0 for node, at in readers):
        for node, _ in readers:
            _cast_rows(node, half, shift, bodies[node], halves)
        return True
    restored = writer.node(home, "Cast", [half], f"{constant.name}_float", to=FLOAT)
    restored.dtype, restored.shape = FLOAT32, list(constant.shape)
    if shift:
        restored = writer.node(home, "Mul", [restored, halves.scale(shift)], f"{constant.name}_scaled")
        restored.dtype, restored.shape = FLOAT32, list(constant.shape)
    for node, at in readers:
        writer.set_input(node, at, restored, bodies[node])
    return False


def _cast_rows(node: Node, table: Constant, shift: int, body: Graph, halves: Halves) -> None:
    output, writer = node.outputs[0], halves.writer
    rows = writer.variable(f"{output.name}_{halves.form.name}", output, halves.form.dtype)
    writer.set_input(node, 0, table, body)
    node.outputs = [rows]
    if not shift:
        writer.make(body, "Cast", [rows], output, to=FLOAT)
        return
    restored = writer.node(body, "Cast", [rows], f"{output.name}_float", to=FLOAT)
    restored.dtype, restored.shape = FLOAT32, output.shape
    writer.make(body, "Mul", [restored, halves.scale(shift)], output)


def _positions(node: Node, tensor: Constant | Variable) -> list[int]:
    return [at for at, given in enumerate(node.inputs) if given is tensor]
