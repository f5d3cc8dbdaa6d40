"""How two models differ, as data. Text, JSON and HTML are views of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

SCHEMA_VERSION = "1"


@dataclass(frozen=True)
class Edit:
    """Something of a model besides nodes and weights. kind: "added", "removed" or "changed".

    what: "input", "output", "operator set", "function", "metadata" and so on. before, after: in words, "" for nothing.
    """

    kind: str
    what: str
    name: str
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class NodeFacts:
    """One node of one model. name: its own, or that of its output. body: where it is, "" for the main graph."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str = ""


@dataclass(frozen=True)
class ValueEdit:
    """An attribute or an input of a node. name: of the attribute, or "input 1". before, after: "" for an absent one."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class NodeEdit:
    """One node of both models that differs. name_after: "" where both call it the same."""

    name: str
    operator: str
    body: str = ""
    name_after: str = ""
    attributes: tuple[ValueEdit, ...] = ()
    inputs: tuple[ValueEdit, ...] = ()
    outputs: tuple[ValueEdit, ...] = ()


@dataclass(frozen=True)
class WeightFacts:
    """One weight of one model."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    bytes: int
    body: str = ""


@dataclass(frozen=True)
class WeightEdit:
    """A weight that both models have and that differs. dtype_after, dims_after: those of B.

    Where types of number and dims allow it: differing: share of elements; max_abs: the largest |difference|; relative:
    the norm of the difference over that of A's values, infinite where these are zero; all None else.
    """

    name: str
    name_after: str
    dtype: str
    dtype_after: str
    dims: tuple[int, ...]
    dims_after: tuple[int, ...]
    bytes: int
    bytes_after: int
    differing: float | None = None
    max_abs: float | None = None
    relative: float | None = None
    body: str = ""


@dataclass(frozen=True)
class Totals:
    """Of one model: nodes of all bodies and functions, constants, and bytes of their values."""

    nodes: int
    weights: int
    weight_bytes: int


@dataclass(frozen=True)
class Difference:
    """Two models, A before and B after. before, after: their files, None for those in memory.

    Nodes count as equal when operator, attributes and inputs are, whatever they and their tensors are called: `renamed`
    counts those nodes, and the constants, that are called otherwise. equal_nodes, equal_weights: no difference at all.
    """

    before: str | None
    after: str | None
    totals: tuple[Totals, Totals]
    equal_nodes: int
    equal_weights: int
    renamed: int
    edits: tuple[Edit, ...] = ()
    added: tuple[NodeFacts, ...] = ()
    removed: tuple[NodeFacts, ...] = ()
    changed: tuple[NodeEdit, ...] = ()
    weights_added: tuple[WeightFacts, ...] = ()
    weights_removed: tuple[WeightFacts, ...] = ()
    weights_changed: tuple[WeightEdit, ...] = ()
    schema_version: str = field(default=SCHEMA_VERSION)

    @property
    def equal(self) -> bool:
        """Whether the models are the same but for the names of inner tensors and nodes."""
        return not any(
            (
                self.edits,
                self.added,
                self.removed,
                self.changed,
                self.weights_added,
                self.weights_removed,
                self.weights_changed,
            )
        )

    @property
    def by_operator(self) -> dict[str, tuple[int, int, int]]:
        """Operator -> (added, removed, changed) nodes, the most first."""
        counts = [Counter(node.operator for node in nodes) for nodes in (self.added, self.removed, self.changed)]
        found = {name: (counts[0][name], counts[1][name], counts[2][name]) for each in counts for name in each}
        return dict(sorted(found.items(), key=lambda entry: (-sum(entry[1]), entry[0])))

    def to_json(self) -> str:
        """The record as JSON, `equal` and `by_operator` included."""
        from onnxopt.report.difference_view import dump

        return dump(self)

    def to_text(self) -> str:
        """The record for the eye, in 80 columns, without colours."""
        from onnxopt.report.difference_view import plain

        return plain(self)

    def to_html(self) -> str:
        """The record as one page that needs nothing else."""
        from onnxopt.report.difference_html import page

        return page(self)

    def node_lists(self) -> Iterator[tuple[str, tuple[NodeFacts, ...]]]:
        """ "added" and "removed" with their nodes."""
        yield "added", self.added
        yield "removed", self.removed
