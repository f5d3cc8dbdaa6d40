"""Fuse Pad into the Conv or pool that follows.

    Before                                              After
    t = Pad(x, {0, 0, 1, 1, 0, 0, 2, 2})                y = Conv(x, W) {pads: [1, 1, 2, 2]}
    y = Conv(t, W)
    t = Pad(x, {0, 0, 1, 1, 0, 0, 1, 1})                y = AveragePool(x) {pads: [1, 1, 1, 1], count_include_pad: 1}
    y = AveragePool(t)

The Pad must add constant numbers of zeros, in front of a MaxPool of negative infinities, around spatial axes only.
onnxruntime's kernels for x86 give the same bits; a kernel that skips padded positions may add in another order, so this
counts as rounding. Exporters that emulate "same" padding, or averages that count it, write such pairs; integer Conv
kernels need the Pad to be gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from onnx import AttributeProto

from onnxopt.graph import NodeEdits, label
from onnxopt.graph.shapes import Fact, known
from onnxopt.model import Constant, Model, Node
from onnxopt.passbase import Change, Context, Effect, Pass, PassResult, Skip, option

# onnxruntime's blocked convolution takes 1.3 to 4.6 times as long with pads of its own where an image is one wide and
# the kernel at least this long
_LONG = 8
_TAKES = (("", "Conv"), ("", "AveragePool"), ("", "MaxPool"))


@dataclass(frozen=True)
class FusePad(Pass):
    """Fuse Pad into the Conv or pool that follows."""

    name: ClassVar[str] = "fuse_pad"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants",)
    always: bool = option(False, "fuse into long kernels on images one wide too, which onnxruntime then runs slower")

    @property
    def effect(self) -> Effect:
        """The same products, possibly added in another order."""
        return Effect.ROUNDING

    def run(self, model: Model, context: Context) -> PassResult:
        """Fuse in all bodies. A Pad that several nodes read stays until all of them can take it over."""
        model.normalize()
        changes: list[Change] = []
        skipped: list[Skip] = []
        outputs = {id(tensor) for body in model.bodies() for tensor in body.outputs}
        facts: dict[int, Fact] | None = None
        for body in list(model.bodies()):
            edits = NodeEdits(body)
            for pad in [node for node in body.nodes if node.kind == ("", "Pad")]:
                name = label(pad)
                reason = _reason_to_stay(pad, edits, outputs)
                if reason is None and not self.always and any(map(_is_long, pad.outputs[0].outputs)):
                    if facts is None:
                        edits.write()
                        facts = known(model)
                    reason = _reason_for_speed(pad, facts)
                if reason:
                    skipped.append(Skip(name, reason))
                    continue
                readers = list({id(reader): reader for reader in pad.outputs[0].outputs}.values())
                _fuse(pad, readers, edits)
                changes.append(Change("fused", name, f"into {', '.join(map(label, readers))}"))
            edits.write()
        return PassResult(changes, skipped)


def _reason_to_stay(pad: Node, body: NodeEdits, outputs: set[int]) -> str | None:
    if any(isinstance(value, AttributeProto) for value in pad.attrs.values()):
        return "an attribute is a parameter of the function it stands in"
    if pad.attrs.get("mode", "constant") != "constant":
        return f"it pads by {pad.attrs['mode']}, not with zeros"
    amounts = _amounts(pad)
    if amounts is None:
        return "its pads are not constant"
    begins, ends = amounts
    if min(*begins, *ends) < 0 or any(begins[:2]) or any(ends[:2]):
        return "it crops, or pads the batch or channel axis"
    if id(pad.outputs[0]) in outputs or not pad.outputs[0].outputs:
        return "its result is an output of the graph"
    for reader in pad.outputs[0].outputs:
        if reader.kind not in _TAKES or reader not in body or reader.inputs[0] is not pad.outputs[0]:
            return f"{reader.op} {label(reader)} reads it, which has no pads of its own"
        reason = _reason_of_reader(reader, pad, [*begins[2:], *ends[2:]])
        if reason is not None:
            return reason
    return None


def _reason_of_reader(reader: Node, pad: Node, extra: list[int]) -> str | None:
    name = f"{reader.op} {label(reader)}"
    if not _fills_with(pad, -np.inf if reader.op == "MaxPool" else 0.0):
        wanted = "negative infinity" if reader.op == "MaxPool" else "zero"
        return f"{name} reads it, and it does not pad with a constant {wanted}"
    if any(tensor is pad.outputs[0] for tensor in reader.inputs[1:]):
        return f"{name} reads it as weights too"
    if reader.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return f"{name} chooses its own pads ({reader.attrs['auto_pad']})"
    own = reader.attrs.get("pads") or [0] * len(extra)
    if not isinstance(own, list):
        return f"the pads of {name} are a parameter of its function"
    return None if reader.op == "Conv" else _reason_of_pool(reader, own, extra)


def _reason_of_pool(pool: Node, own: list[int], extra: list[int]) -> str | None:
    name = f"{pool.op} {label(pool)}"
    kernel = pool.attrs.get("kernel_shape")
    if not isinstance(kernel, list) or len(own) != len(extra) or len(extra) != 2 * len(kernel):
        return f"{name} has another number of axes"
    if pool.attrs.get("ceil_mode", 0) or len(pool.outputs) > 1:
        return f"{name} rounds its length up, or tells where its maxima are"
    if pool.op == "AveragePool" and any(own) and not pool.attrs.get("count_include_pad", 0):
        return f"{name} does not count its own pads"
    if any(mine + more >= size for mine, more, size in zip(own, extra, kernel * 2, strict=True)):
        return f"{name} would have pads as long as its kernel, which runtimes refuse"
    return None


def _is_long(reader: Node) -> bool:
    weight = reader.inputs[1] if reader.op == "Conv" else None
    kernel = weight.shape[2:] if isinstance(weight, Constant) else ()
    return len(kernel) == 2 and min(kernel) == 1 and max(kernel) >= _LONG


def _reason_for_speed(pad: Node, facts: dict[int, Fact]) -> str | None:
    shape = facts.get(id(pad.inputs[0]), Fact()).shape
    if shape is None or len(shape) != 4 or 1 not in shape[2:]:
        return None
    conv = next(conv for conv in pad.outputs[0].outputs if _is_long(conv))
    return f"Conv {label(conv)} has a long kernel on an image one wide, which is faster without pads (always=false)"


def _fills_with(pad: Node, wanted: float) -> bool:
    if len(pad.inputs) > 2 and not pad.inputs[2].is_empty():
        value = pad.inputs[2]
        return isinstance(value, Constant) and bool(np.all(value.values.astype(np.float64) == wanted))
    return bool(pad.attrs.get("value", 0.0) == wanted)


def _amounts(pad: Node) -> tuple[list[int], list[int]] | None:
    """Pads at the begin and the end of every axis; None where they are not constant. Attributes before opset 11."""
    if len(pad.inputs) > 3 and not pad.inputs[3].is_empty():
        return None
    if len(pad.inputs) > 1:
        given = pad.inputs[1].values.reshape(-1).tolist() if isinstance(pad.inputs[1], Constant) else None
    else:
        given = pad.attrs.get("pads")
    if given is None or len(given) % 2 or len(given) < 6:
        return None
    return given[: len(given) // 2], given[len(given) // 2 :]


def _fuse(pad: Node, readers: list[Node], edits: NodeEdits) -> None:
    amounts = _amounts(pad)
    assert amounts is not None
    extra = [*amounts[0][2:], *amounts[1][2:]]
    source = pad.inputs[0]
    for reader in readers:
        own = reader.attrs.get("pads") or [0] * len(extra)
        if reader.attrs.get("auto_pad") == "VALID":
            own = [0] * len(extra)
            reader.attrs.pop("auto_pad")
        reader.attrs["pads"] = [int(mine + more) for mine, more in zip(own, extra, strict=True)]
        if reader.op == "AveragePool":
            reader.attrs["count_include_pad"] = 1
        reader.inputs[0] = source
    edits.remove(pad)
