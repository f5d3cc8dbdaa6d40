"""Differences between two models as one page: no scripts, no fonts, no pictures, nothing fetched; light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from onnxopt.inspection.difference import Difference, Edit, NodeEdit, NodeFacts, WeightEdit, WeightFacts
from onnxopt.report import quantities as q
from onnxopt.report.difference_view import edits_of, kind, verdict, weight_cells

# entries of one list that the page shows; JSON has them all
_MOST = 2000
# lists of up to so many entries stand open
_OPEN = 25

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1b2027; --soft: #5c6672; --line: #e1e5ea;
  --code: #f0f2f5; --plus: #11703a; --minus: #b3261e; --edit: #8a5a00; --plus-bg: #dff3e6; --minus-bg: #fbe3e1;
  --edit-bg: #fbeecd; --accent: #2457c5; }
@media (prefers-color-scheme: dark) { :root { --page: #12151a; --card: #1a1f26; --text: #e4e8ee; --soft: #98a3b1;
  --line: #2b323c; --code: #222933; --plus: #7ddba0; --minus: #ff9d94; --edit: #f0c060; --plus-bg: #153523;
  --minus-bg: #43211f; --edit-bg: #3d3116; --accent: #8db2ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 24px; line-height: 1.3; margin: 0 0 4px; overflow-wrap: anywhere; font-weight: 650; }
h1 span { color: var(--soft); font-weight: 400; padding: 0 6px; }
.paths { color: var(--soft); font-size: 13px; margin: 0 0 20px; overflow-wrap: anywhere; }
.verdict { padding: 12px 16px; border-radius: 10px; margin: 0 0 20px; background: var(--edit-bg); color: var(--edit); }
.verdict.equal { background: var(--plus-bg); color: var(--plus); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px; margin: 0 0 24px; }
.card, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 12px 16px; }
.card b { display: block; font-size: 12px; font-weight: 600; color: var(--soft); text-transform: uppercase;
  letter-spacing: .05em; }
.card em { font-style: normal; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.card em i { font-style: normal; color: var(--soft); font-weight: 400; padding: 0 4px; }
.card small { color: var(--soft); display: block; }
section { margin: 0 0 16px; overflow: hidden; }
summary { cursor: pointer; padding: 12px 16px; font-weight: 600; }
summary:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; border-radius: 10px; }
summary span { color: var(--soft); font-weight: 400; padding-left: 6px; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; border-top: 1px solid var(--line); }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-size: 12px; font-weight: 600; color: var(--soft); padding: 8px 16px 6px;
  white-space: nowrap; }
td { padding: 6px 16px; border-top: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
tbody tr:first-child td { border-top: 0; }
th + th, td + td { padding-left: 0; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.name, code { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.operator { white-space: nowrap; }
.soft { color: var(--soft); }
.mark { display: inline-block; min-width: 62px; text-align: center; padding: 0 8px; border-radius: 999px;
  font-size: 12px; line-height: 20px; white-space: nowrap; }
.added { background: var(--plus-bg); color: var(--plus); }
.removed { background: var(--minus-bg); color: var(--minus); }
.changed { background: var(--edit-bg); color: var(--edit); }
del { text-decoration: none; background: var(--minus-bg); color: var(--minus); border-radius: 4px; padding: 0 4px; }
ins { text-decoration: none; background: var(--plus-bg); color: var(--plus); border-radius: 4px; padding: 0 4px; }
.bar { display: flex; height: 10px; min-width: 120px; margin-top: 6px; }
.bar i { display: block; height: 100%; min-width: 2px; }
.bar .plus { background: var(--plus); }
.bar .minus { background: var(--minus); }
.bar .edit { background: var(--edit); }
.bar i:first-child { border-radius: 5px 0 0 5px; } .bar i:last-child { border-radius: 0 5px 5px 0; }
.bar i:only-child { border-radius: 5px; }
.more { padding: 10px 16px; color: var(--soft); border-top: 1px solid var(--line); }
footer { color: var(--soft); font-size: 13px; margin-top: 24px; }
@media print { body { background: #fff; } section { break-inside: avoid; } }
""".strip()


def page(found: Difference) -> str:
    """The whole page as text."""
    names = [Path(path).name if path else "a model in memory" for path in (found.before, found.after)]
    paths = " &rarr; ".join(escape(path or "a model in memory") for path in (found.before, found.after))
    body = "\n".join(_sections(found))
    equal = " equal" if found.equal else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(names[0])} and {escape(names[1])}</title>
<style>
{_STYLE}
</style>
</head>
<body>
<main>
<h1>{escape(names[0])}<span>&rarr;</span>{escape(names[1])}</h1>
<p class="paths">{paths}</p>
<p class="verdict{equal}">{escape(_sentence(verdict(found)))}</p>
{_cards(found)}
{body}
<footer>Written by onnxopt diff. Nodes and weights count as equal whatever they are called.</footer>
</main>
</body>
</html>
"""


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _cards(found: Difference) -> str:
    one, other = found.totals
    rows = (
        ("Nodes", q.count(one.nodes), q.count(other.nodes), q.change(one.nodes, other.nodes)),
        ("Weights", q.count(one.weights), q.count(other.weights), q.change(one.weights, other.weights)),
        (
            "Bytes of weights",
            q.size(one.weight_bytes),
            q.size(other.weight_bytes),
            q.change(one.weight_bytes, other.weight_bytes),
        ),
    )
    return f'<div class="cards">{"".join(_card(*row) for row in rows)}</div>'


def _card(title: str, before: str, after: str, change: str) -> str:
    before, after = (text.replace(" ", "&nbsp;") for text in (before, after))
    value = before if before == after else f"{before}<i>&rarr;</i>{after}"
    return f'<div class="card"><b>{title}</b><em>{value}</em><small>{change}</small></div>'


def _sections(found: Difference) -> Iterator[str]:
    if found.edits:
        edits = (_edit(edit) for edit in found.edits)
        yield _section("Signature and metadata", len(found.edits), ("", "what", "name", "change"), edits)
    if found.by_operator:
        yield _operators(found)
    if found.changed:
        changed = map(_changed_node, found.changed)
        yield _section("Nodes changed", len(found.changed), ("operator", "name", "change"), changed)
    for title, nodes in found.node_lists():
        if nodes:
            yield _section(f"Nodes {title}", len(nodes), ("operator", "name", "reads"), map(_node, nodes))
    if found.weights_changed:
        most = sorted(found.weights_changed, key=lambda edit: -(edit.relative or 0.0))
        head = ("name", "type and dims", "#differ", "#max |d|", "#relative")
        yield _section("Weights changed", len(most), head, map(_changed_weight, most))
    for title, weights in (("added", found.weights_added), ("removed", found.weights_removed)):
        if weights:
            largest = sorted(weights, key=lambda weight: -weight.bytes)
            columns = ("name", "type and dims", "#bytes")
            yield _section(f"Weights {title}", len(weights), columns, map(_weight, largest))


def _edit(edit: Edit) -> tuple[str, ...]:
    return _mark(edit.kind), escape(edit.what), _name(edit.name), _change(edit.before, edit.after)


def _section(title: str, number: int, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A list that can be folded away. head: titles of columns, "#" in front of those of numbers."""
    numeric = [name.startswith("#") for name in head]
    titles = "".join(
        f"<th{' class=number' if right else ''}>{escape(name.lstrip('#'))}</th>"
        for name, right in zip(head, numeric, strict=True)
    )
    made = []
    for _, cells in zip(range(_MOST), rows, strict=False):
        made.append("<tr>" + "".join(_cell(*each) for each in zip(cells, numeric, strict=True)) + "</tr>")
    more = (
        f'<div class="more">and {q.count(number - _MOST)} more; --format json lists all</div>' if number > _MOST else ""
    )
    table = f"<table><thead><tr>{titles}</tr></thead><tbody>\n" + "\n".join(made) + "\n</tbody></table>"
    return _folding(title, q.count(number), f'<div class="scroll">{table}</div>{more}', number <= _OPEN)


def _folding(title: str, beside: str, content: str, unfolded: bool) -> str:
    state = " open" if unfolded else ""
    return (
        f"<section><details{state}><summary>{escape(title)}<span>{beside}</span></summary>{content}</details></section>"
    )


def _cell(content: str, number: bool) -> str:
    return f"<td class=number>{content}</td>" if number else f"<td>{content}</td>"


def _operators(found: Difference) -> str:
    largest = max(sum(numbers) for numbers in found.by_operator.values())
    rows = []
    for name, numbers in found.by_operator.items():
        signs = [f"{sign}{q.count(number)}" if number else "" for sign, number in zip("+−~", numbers, strict=True)]
        parts = "".join(
            f'<i class="{role}" style="width:{number / largest * 100:.2f}%"></i>'
            for role, number in zip(("plus", "minus", "edit"), numbers, strict=True)
            if number
        )
        rows.append((_operator(name), *signs, f'<div class="bar">{parts}</div>'))
    head = ("operator", "#added", "#removed", "#changed", "")
    return _section("Nodes by operator", len(rows), head, rows)


def _node(node: NodeFacts) -> tuple[str, str, str]:
    reads = ", ".join(escape(name) for name in node.inputs if name)
    return _operator(node.operator), _name(node.name, "", node.body), f'<span class="name soft">{reads}</span>'


def _changed_node(node: NodeEdit) -> tuple[str, ...]:
    edits = (f"{escape(edit.name)}: {_change(edit.before, edit.after)}" for edit in edits_of(node))
    return _operator(node.operator), _name(node.name, node.name_after, node.body), "<br>".join(edits)


def _weight(weight: WeightFacts) -> tuple[str, str, str]:
    return _name(weight.name, "", weight.body), escape(kind(weight.dtype, weight.dims)), q.size(weight.bytes)


def _changed_weight(edit: WeightEdit) -> tuple[str, ...]:
    before, after, *figures = weight_cells(edit)
    kinds = _change(before, after) if after else escape(before)
    return _name(edit.name, edit.name_after, edit.body), kinds, *map(escape, figures)


def _name(name: str, after: str = "", body: str = "") -> str:
    renamed = f' <span class="soft">&rarr;</span> {escape(after)}' if after and after != name else ""
    where = f'<br><span class="soft">in {escape(body)}</span>' if body else ""
    return f'<span class="name">{escape(name)}{renamed}</span>{where}'


def _change(before: str, after: str) -> str:
    parts = [f"<{tag}>{escape(text)}</{tag}>" for tag, text in (("del", before), ("ins", after)) if text]
    return " &rarr; ".join(parts) or '<span class="soft">nothing</span>'


def _operator(name: str) -> str:
    return f'<span class="operator">{escape(name)}</span>'


def _mark(kind_: str) -> str:
    return f'<span class="mark {kind_}">{kind_}</span>'
