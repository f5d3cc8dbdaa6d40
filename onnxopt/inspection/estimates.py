"""What each pass could win on a model: cheap estimates, each naming its pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from onnxopt.graph import operators
from onnxopt.inspection.rank import BLOCK, RELATIVE_ERROR, low_rank
from onnxopt.inspection.record import Estimate
from onnxopt.inspection.trials import Trial, installed, tried
from onnxopt.inspection.weights import Values
from onnxopt.model import Constant, Model, Node
from onnxopt.quantization.storage import find_weights

# weights below this size are not stored as bitmasks
_MASKED_FROM = 1024
# from so many zeros on a share is worth telling
_ZEROS_FROM = 0.01


def estimates(model: Model, values: Mapping[int, Values], *, trials: bool = True) -> Iterator[Estimate]:
    """Everything that could be won, in the order of passes. `model` is left alone; shapes are inferred already.

    trials: whether passes may be tried on copies, for which the runtime computes parts of the model.
    """
    if trials:
        yield from _trials(model)
    yield from _unread(model)
    yield from _identities(model)
    yield from _zeros(values)
    yield from _palettes(values)
    yield from _low_rank(model)
    yield from _halves(values)
    yield from _int8(model)


def _trials(model: Model) -> Iterator[Estimate]:
    told: tuple[tuple[str, tuple[str, ...], Callable[[Trial], str]], ...] = (
        ("duplicates", ("dedup",), lambda trial: f"{_many(trial.count, 'weight')} that follow from another"),
        ("foldable", ("fold_constants",), lambda trial: f"{_many(trial.nodes, 'node')} that no input reaches"),
        ("fusable", ("fold_constants", "fuse_bn"), lambda trial: f"{_many(trial.count, 'BatchNormalization')} to fuse"),
        ("channels", ("fold_constants", "fuse_bn", "prune"), _channels),
        ("simpler", ("simplify",), lambda trial: f"{_many(trial.nodes, 'node')} that can go"),
    )
    for kind, passes, what in told:
        if not all(map(installed, passes)):
            continue
        trial = tried(model, passes)
        if trial.failed:
            yield Estimate(kind, passes[-1], f"not estimated: {trial.failed}")
        elif trial.changes:
            count = trial.nodes if kind in ("foldable", "simpler") else trial.count
            yield Estimate(kind, passes[-1], what(trial), count, max(trial.bytes, 0))


def _channels(trial: Trial) -> str:
    return f"{_many(trial.count, 'channel')} dead, constant, proportional or unread"


def _unread(model: Model) -> Iterator[Estimate]:
    used = {id(tensor) for body in model.bodies() for tensor in body.outputs}
    nodes = sum(
        operators.is_pure(node) and not any(t.outputs or id(t) in used for t in node.outputs)
        for body in model.bodies()
        for node in body.nodes
    )
    unused = [constant for constant in model.constants() if not constant.outputs and id(constant) not in used]
    if nodes or unused:
        parts = [_many(len(unused), "weight") if unused else "", _many(nodes, "node") if nodes else ""]
        size = sum(constant.data.stored_nbytes for constant in unused)
        what = f"{' and '.join(filter(None, parts))} that nothing reads"
        yield Estimate("unused", _installed("simplify", "eliminate_dead_code"), what, nodes + len(unused), size)


def _identities(model: Model) -> Iterator[Estimate]:
    count = sum(_does_nothing(node) for body in model.bodies() for node in body.nodes)
    if count:
        what = f"{_many(count, 'node')} whose output is {'its' if count == 1 else 'their'} input"
        yield Estimate("identities", _installed("simplify", "eliminate_identity"), what, count)


def _does_nothing(node: Node) -> bool:
    if node.kind[0] != "" or not node.inputs or not node.outputs:
        return False
    source, made = node.inputs[0], node.outputs[0]
    if node.op == "Identity":
        return not isinstance(source, Constant)
    if node.op == "Dropout":
        mask = len(node.outputs) > 1 and bool(node.outputs[1].outputs)
        return not operators.is_training(node) and not mask
    if node.op == "Cast":
        return source.dtype is not None and made.dtype is not None and source.dtype == made.dtype
    if node.op == "Transpose":
        order = node.attrs.get("perm")
        return isinstance(order, list) and order == list(range(len(order)))
    if node.op in ("Concat", "Sum", "Max", "Min", "Mean"):
        return len(node.inputs) == 1
    if node.op in ("Reshape", "Expand", "Flatten", "Squeeze", "Unsqueeze"):
        dims = [list(t.shape) if t.shape is not None else None for t in (source, made)]
        return dims[0] is not None and dims[0] == dims[1] and all(isinstance(dim, int) for dim in dims[0])
    return False


def _zeros(values: Mapping[int, Values]) -> Iterator[Estimate]:
    looked = sum(seen.elements for seen in values.values())
    zeros = sum(seen.zeros for seen in values.values())
    if looked and zeros / looked >= _ZEROS_FROM:
        what = f"{zeros / looked * 100:.1f} % of the weights are zero: bitmasks and the others store them"
        saved = sum(max(0, _masked(seen)) for seen in values.values())
        yield Estimate("zeros", _installed("sparsify"), what, zeros, saved, _sample(values))


def _masked(seen: Values) -> int:
    """Bytes that a bit for each element and the values that are not zero would save, as far as a sample tells."""
    data = seen.data
    others = data.size * (1 - seen.zeros / seen.elements)
    return int(data.nbytes - data.size / 8 - others * data.dtype.itemsize) if data.nbytes >= _MASKED_FROM else 0


def _palettes(values: Mapping[int, Values]) -> Iterator[Estimate]:
    found = [(seen, bits) for seen in values.values() if (bits := seen.palette_bits) is not None]
    if found:
        saved = sum(seen.data.nbytes - seen.palette_bytes(bits) for seen, bits in found)
        widths = sorted({bits for _, bits in found})
        spread = f"{widths[0]} bits" if len(widths) == 1 else f"{widths[0]} to {widths[-1]} bits"
        what = f"{_many(len(found), 'weight')} of few values: {spread} an element lose nothing"
        yield Estimate("palette", _installed("share"), what, len(found), saved, _sample(values))


def _low_rank(model: Model) -> Iterator[Estimate]:
    found = low_rank(model)
    parts = [
        f"{found.whole:,} of {found.candidates:,} matrices whole",
        f"{found.blocks:,} by a block of {BLOCK} x {BLOCK}" if found.blocks else "",
    ]
    part = ", ".join(filter(None, parts)) if found.whole < found.candidates else ""
    if found.matrices or found.whole + found.blocks < found.candidates:
        noun = "matrix" if found.matrices == 1 else "matrices"
        what = f"{found.matrices or 'no'} {noun} of low rank at a relative error of {RELATIVE_ERROR:g}"
        yield Estimate("low_rank", _installed("lowrank"), what, found.matrices, found.bytes, part)


def _halves(values: Mapping[int, Values]) -> Iterator[Estimate]:
    singles = [seen.data for seen in values.values() if seen.data.dtype == np.float32]
    if singles:
        what = f"{_many(len(singles), 'float32 weight')} in 16 bits"
        yield Estimate("half", _installed("fp16"), what, len(singles), sum(data.nbytes for data in singles) // 2)


def _int8(model: Model) -> Iterator[Estimate]:
    saved: dict[int, int] = {}
    for stored in find_weights(model):
        data = stored.weight.data
        if data.dtype == np.float32 and len(data.shape) >= 2:
            gain = data.nbytes - data.size - 4 * int(np.prod(stored.scale_shape))
            saved[data.uid] = gain
    gains = [gain for gain in saved.values() if gain > 0]
    if gains:
        what = f"{_many(len(gains), 'weight')} of layers and tables in 8 bits"
        yield Estimate("int8", _installed("int8_weights"), what, len(gains), sum(gains))


def _sample(values: Mapping[int, Values]) -> str:
    looked = sum(seen.elements for seen in values.values())
    held = sum(seen.data.size for seen in values.values())
    return "" if looked == held else f"{looked:,} of {held:,} elements"


def _installed(*wanted: str) -> str:
    return next(filter(installed, wanted), "")


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
