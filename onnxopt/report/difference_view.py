"""Differences between two models as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from onnxopt.inspection.difference import Difference, NodeEdit, NodeFacts, ValueEdit, WeightEdit, WeightFacts
from onnxopt.report import json_view
from onnxopt.report import quantities as q
from onnxopt.report.layout import WIDTH, Line, Span, joined, table, wrapped

# entries of a list that are shown without detail
_SHOWN = 6
_MARKS = {"added": ("+", "good"), "removed": ("-", "bad"), "changed": ("~", "warn")}


def dump(found: Difference) -> str:
    """The record as JSON, with `equal`, and `by_operator` as {operator: {added, removed, changed}}."""
    counts = {
        name: dict(zip(("added", "removed", "changed"), numbers, strict=True))
        for name, numbers in found.by_operator.items()
    }
    return json_view.text_of({**json_view.fields_of(found), "equal": found.equal, "by_operator": counts})


def plain(found: Difference, detail: int = 0) -> str:
    """Text without colours; see `lines`."""
    return joined(lines(found, detail))


def lines(found: Difference, detail: int = 0) -> Iterator[Line]:
    """What differs, in sections. detail: 1 lists everything, else each list has its first entries."""
    before, after = (Path(path).name if path else "a model in memory" for path in (found.before, found.after))
    yield (Span(q.shortened(f"{before} -> {after}", WIDTH), "head"),)
    yield from ((Span(line, "good" if found.equal else "plain"),) for line in wrapped(verdict(found)))
    yield from _totals(found)
    yield from _edits(found, detail)
    yield from _operators(found)
    for title, nodes in found.node_lists():
        yield from _nodes(title, nodes, detail)
    yield from _changed(found.changed, detail)
    yield from _weights(found, detail)


def verdict(found: Difference) -> str:
    """One line: equal, or how much differs."""
    renamed = f", {q.count(found.renamed)} of them under other names" if found.renamed else ""
    if found.equal:
        return f"equal: {_nodes_of(found.equal_nodes)} and {_weights_of(found.equal_weights)}{renamed}"
    numbers = (
        (len(found.added), "added"),
        (len(found.removed), "removed"),
        (len(found.changed), "changed"),
    )
    nodes = ", ".join(f"{q.count(number)} {what}" for number, what in numbers if number) or "all equal"
    weights = (
        (len(found.weights_added), "added"),
        (len(found.weights_removed), "removed"),
        (len(found.weights_changed), "changed"),
    )
    tensors = ", ".join(f"{q.count(number)} {what}" for number, what in weights if number) or "all equal"
    same = f"{_nodes_of(found.equal_nodes)} and {_weights_of(found.equal_weights)} equal{renamed}"
    return f"nodes: {nodes}; weights: {tensors}; {same}"


def _nodes_of(number: int) -> str:
    return f"{q.count(number)} node{'' if number == 1 else 's'}"


def _weights_of(number: int) -> str:
    return f"{q.count(number)} weight{'' if number == 1 else 's'}"


def _totals(found: Difference) -> Iterator[Line]:
    one, other = found.totals
    if one == other:
        return
    yield ()
    rows = [
        ["", "before", "after", "change"],
        ["nodes", q.count(one.nodes), q.count(other.nodes), q.change(one.nodes, other.nodes)],
        ["weights", q.count(one.weights), q.count(other.weights), q.change(one.weights, other.weights)],
        ["bytes", *map(q.size, (one.weight_bytes, other.weight_bytes)), q.change(one.weight_bytes, other.weight_bytes)],
    ]
    yield from table(rows, "<>>>")


def _edits(found: Difference, detail: int) -> Iterator[Line]:
    if not found.edits:
        return
    yield ()
    yield (Span("signature and metadata", "head"),)
    shown = found.edits if detail else found.edits[: 2 * _SHOWN]
    for edit in shown:
        yield from _entry(edit.kind, f"{edit.what} {edit.name}".strip() + f": {values(edit.before, edit.after)}")
    yield from _more(len(found.edits) - len(shown))


def _operators(found: Difference) -> Iterator[Line]:
    if not found.by_operator:
        return
    yield ()
    yield (Span("nodes by operator", "head"),)
    told = []
    for name, numbers in found.by_operator.items():
        signs = [f"{sign}{q.count(number)}" for sign, number in zip("+-~", numbers, strict=True) if number]
        told.append(f"{name} {' '.join(signs)}")
    yield from ((Span(line),) for line in wrapped(", ".join(told)))


def _nodes(title: str, nodes: Sequence[NodeFacts], detail: int) -> Iterator[Line]:
    if not nodes:
        return
    yield ()
    yield (Span(f"nodes {title}", "head"),)
    shown = nodes if detail else nodes[:_SHOWN]
    for node in shown:
        where = f", in {node.body}" if node.body else ""
        reads = f" <- {', '.join(node.inputs)}" if detail and node.inputs else ""
        yield from _entry(title, f"{node.operator} {node.name}{reads}{where}")
    yield from _more(len(nodes) - len(shown))


def _changed(nodes: Sequence[NodeEdit], detail: int) -> Iterator[Line]:
    if not nodes:
        return
    yield ()
    yield (Span("nodes changed", "head"),)
    shown = nodes if detail else nodes[:_SHOWN]
    for node in shown:
        where = f", in {node.body}" if node.body else ""
        after = f" -> {node.name_after}" if node.name_after else ""
        yield from _entry("changed", f"{node.operator} {node.name}{after}{where}")
        for edit in edits_of(node):
            text = f"{edit.name}: {values(edit.before, edit.after)}"
            yield from ((Span(f"  {line}"),) for line in wrapped(text, break_words=True, margin=2))
    yield from _more(len(nodes) - len(shown))


def _weights(found: Difference, detail: int) -> Iterator[Line]:
    for title, weights in (("added", found.weights_added), ("removed", found.weights_removed)):
        if weights:
            yield ()
            yield (Span(f"weights {title}", "head"), Span(f", {q.size(sum(weight.bytes for weight in weights))}"))
            largest = sorted(weights, key=lambda weight: -weight.bytes)
            shown = largest if detail else largest[:_SHOWN]
            for weight in shown:
                yield from _entry(title, weight_text(weight))
            yield from _more(len(weights) - len(shown))
    if found.weights_changed:
        yield ()
        yield (Span("weights changed", "head"),)
        most = sorted(found.weights_changed, key=lambda edit: -(edit.relative or 0.0))
        chosen = most if detail else most[:_SHOWN]
        rows = [["name", "was", "is", "differ", "max |d|", "relative"]]
        rows += [[edit.name, *weight_cells(edit)] for edit in chosen]
        used = [at for at in range(6) if at < 2 or any(row[at] for row in rows[1:])]
        rows = [[row[at] for at in used] for row in rows]
        room = max(12, WIDTH - 2 - sum(2 + max(len(row[at]) for row in rows) for at in range(1, len(used))))
        yield from table([[q.shortened(row[0], room), *row[1:]] for row in rows], "<" * 2 + ">" * (len(used) - 2))
        yield from _more(len(found.weights_changed) - len(chosen))


def weight_text(weight: WeightFacts) -> str:
    """ "w: float32[64,3], 768 B, in body then"."""
    where = f", in {weight.body}" if weight.body else ""
    return f"{weight.name}: {kind(weight.dtype, weight.dims)}, {q.size(weight.bytes)}{where}"


def weight_cells(edit: WeightEdit) -> list[str]:
    """Was, is (empty where type and dims stayed), share that differs, largest difference, relative error."""
    before, after = kind(edit.dtype, edit.dims), kind(edit.dtype_after, edit.dims_after)
    differing = "" if edit.differing is None else f"{edit.differing * 100:.3g} %"
    return [
        before,
        after if after != before else "",
        differing,
        q.figure(edit.max_abs, ".2e"),
        q.figure(edit.relative, ".1e"),
    ]


def kind(dtype: str, dims: Sequence[int]) -> str:
    """float32[64,3]."""
    return f"{dtype}[{','.join(map(str, dims))}]"


def values(before: str, after: str) -> str:
    """ "a -> b", or the one that there is."""
    one, other = (q.shortened(" ".join(text.split()), 120) for text in (before, after))
    if not before or not after:
        return f"{one} -> nothing" if before else f"nothing -> {other}" if after else "nothing"
    return f"{one} -> {other}"


def edits_of(node: NodeEdit) -> tuple[ValueEdit, ...]:
    """Attributes, inputs and outputs of a changed node that differ."""
    return (*node.attributes, *node.inputs, *node.outputs)


def _entry(kind_: str, text: str) -> Iterator[Line]:
    mark, role = _MARKS[kind_]
    first, *more = wrapped(f"  {text}", break_words=True, margin=2)
    yield (Span(f"  {mark} ", role), Span(first.lstrip()))
    yield from ((Span(f"  {line}"),) for line in more)


def _more(number: int) -> Iterator[Line]:
    if number > 0:
        yield (Span(f"  and {q.count(number)} more (-v)", "dim"),)
