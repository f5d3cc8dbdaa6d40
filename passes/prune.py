"""Remove channels that the rest of the graph can do without.

A channel is a position of an axis, followed from the node that makes it through everything that carries it to the nodes
that sum over it (`onnxopt.graph.axes`). With y = W x + b at such a node, column j of W and channel x_j can go when

    x_j = 0                    nothing is lost
    x_j = c                    b += c W_j                       (or, where padding forbids it, as the next line)
    x_j = a x_i                W_i += a W_j                     duplicate channels: a = 1

Before                                   After
    Conv(8 -> 64)                            Conv(8 -> 59)          2 filters were zero, 3 made constants
    Relu                                     Relu
    Conv(64 -> 32, W, b)                     Conv(59 -> 32, W', b')

Convolutions compute channels in blocks, so 31 channels take longer than 32: a convolution keeps a multiple of
`round_to` channels, by default what the target asks for. On CPUs that is 4, which was never slower than the width it
was cut from (benchmarks/widths.py); 8 is often faster, 1 smallest.

Channels joined by Add, Concat, gates or groups go together or not at all. An operator without an axis rule keeps every
channel it touches, and is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from onnx import ValueInfoProto, helper, numpy_helper

from onnxopt.graph import infer, remove_dead, sort_model
from onnxopt.graph.axes import AxisMaps
from onnxopt.graph.channels import Plan, describe, frozen_reasons, held_channels, plan_lossless, remove, site_label
from onnxopt.model import Model, Node
from onnxopt.passbase import Change, Context, Effect, Pass, PassResult, Skip, option

# what one round removes can make more removable; real models settle in two or three
_MOST_ROUNDS = 20


@dataclass(frozen=True)
class Prune(Pass):
    """Remove channels that the rest of the graph can do without."""

    name: ClassVar[str] = "prune"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn")

    round_to: int = option(
        0,
        "keep a multiple of this many channels at convolutions; 1: whatever can go; 0: as the target likes it",
        minimum=0,
        maximum=1024,
    )

    @property
    def effect(self) -> Effect:
        """Sums are re-associated, nothing else."""
        return Effect.ROUNDING

    def run(self, model: Model, context: Context) -> PassResult:
        """Plan and cut until nothing more can go."""
        changes: list[Change] = []
        skipped: list[Skip] = []
        for _ in range(_MOST_ROUNDS):
            maps = axis_maps(model, context)
            plan = plan_lossless(maps, self.round_to or context.target.channels)
            skipped = [Skip(where, reason) for where, reason in frozen_reasons(maps)]
            if not plan.removed:
                break
            changes += _changes(plan)
            remove(maps, plan)
            remove_dead(model)
        return PassResult(changes, skipped, _notes(maps))


def axis_maps(model: Model, context: Context) -> AxisMaps:
    """The axis maps of a model, put in order and with shapes inferred first."""
    model.normalize()
    sort_model(model)
    infer(model)

    def evaluate(node: Node, inputs: list[NDArray[Any] | None]) -> NDArray[Any] | None:
        return _evaluate(model, context, node, inputs)

    return AxisMaps.build(model, evaluate)


def _evaluate(model: Model, context: Context, node: Node, inputs: list[NDArray[Any] | None]) -> NDArray[Any] | None:
    """The node's first output over small inputs, by the runtime; None when it refuses."""
    names = [f"x{index}" if value is not None else "" for index, value in enumerate(inputs)]
    call = helper.make_node(node.op, names, ["y"], **{k: v for k, v in node.attrs.items() if not _is_body(v)})
    constants = [numpy_helper.from_array(value, name) for value, name in zip(inputs, names, strict=True) if name]
    output = ValueInfoProto(name="y")  # the runtime infers its type
    graph = helper.make_graph([call], "element", [], [output], constants)
    proto = helper.make_model(graph, opset_imports=model.carrier.opset_import, ir_version=max(model.ir_version, 4))
    try:
        return np.asarray(context.evaluate(proto, {})[0])
    except Exception:  # noqa: BLE001  what can't be computed is not known to be constant
        return None


def _is_body(value: Any) -> bool:
    return hasattr(value, "nodes")


def _changes(plan: Plan) -> list[Change]:
    return [Change("channels removed", site_label(cut), describe(cut), cut.total) for cut in plan.sites]


def _notes(maps: AxisMaps) -> list[str]:
    made = np.concatenate([np.zeros(0, np.int64), *(site.channels for site in maps.sites)])
    fixed = np.isin(maps.channels.roots(made), sorted(held_channels(maps)))
    return [f"{len(made):,} channels remain, {int(fixed.sum()):,} of them fixed by the graph"]
