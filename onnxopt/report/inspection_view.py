"""Inspections as text, one by one or side by side, and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from onnxopt.inspection.record import SCHEMA_VERSION, Estimate, Inspection, MacFacts, TensorFacts
from onnxopt.report import json_view
from onnxopt.report import quantities as q
from onnxopt.report.layout import WIDTH, Line, Span, joined, table, wrapped

# operators, largest weights and inputs that are shown without detail
_OPERATORS, _WEIGHTS, _ENDS = 12, 5, 12


def dump(models: Sequence[Inspection]) -> str:
    """JSON of one object: schema_version, and under `models` one entry each, in order."""
    return json_view.text_of({"schema_version": SCHEMA_VERSION, "models": list(models)})


def plain(models: Sequence[Inspection], detail: int = 0) -> str:
    """Text without colours; see `lines`."""
    return joined(lines(models, detail))


def lines(models: Sequence[Inspection], detail: int = 0) -> Iterator[Line]:
    """One model in sections, several in one table. detail: 1 lists every operator, input and large weight."""
    if len(models) > 1:
        yield from _side_by_side(models, detail)
        return
    for model in models:
        yield from _one(model, detail)


def _one(model: Inspection, detail: int) -> Iterator[Line]:
    yield (Span(_name(model), "head"),)
    yield from table([[label, value] for label, value in _facts(model).items() if value], "<<", headers=())
    for sidecar in model.sidecars:
        lost = f", {q.size(sidecar.orphan_bytes)} of it read by no tensor" if sidecar.orphan_bytes else ""
        yield from _dim(f"{sidecar.name}: {q.size(sidecar.bytes)}{lost}")
    for title, ends in (("inputs", model.inputs), ("outputs", model.outputs)):
        yield ()
        yield (Span(title, "head"),)
        shown = ends if detail else ends[:_ENDS]
        yield from table([_end(end) for end in shown], "<<<", headers=()) if shown else _dim("none")
        yield from _more(len(ends) - len(shown), title)
    yield ()
    yield (Span("nodes", "head"),)
    yield from ((Span(line),) for line in wrapped(_operators(model.operators, detail)))
    yield from _weights(model, detail)
    yield from _estimates(model.estimates)
    if detail and model.metadata:
        yield ()
        yield (Span("metadata", "head"),)
        for key, value in model.metadata.items():
            yield from ((Span(line),) for line in wrapped(f"{key}: {value}", break_words=True))
    if model.notes:
        yield ()
        yield (Span("notes", "head"),)
        yield from ((Span(line),) for note in model.notes for line in wrapped(note))


def _facts(model: Inspection) -> dict[str, str]:
    versions = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in model.opsets.items())
    bodies = f"{model.bodies} {'body' if model.bodies == 1 else 'bodies'}" if model.bodies else ""
    functions = f"{model.functions} function{'' if model.functions == 1 else 's'}" if model.functions else ""
    within = " and ".join(filter(None, (bodies, functions)))
    nodes = q.count(model.nodes) + (f", those of {within} among them" if within else "")
    return {
        "file": q.size(model.file_bytes),
        "producer": model.producer,
        "IR version": str(model.ir_version),
        "operator sets": versions,
        "nodes": nodes,
        "weights": f"{q.size(model.weight_bytes)}, {q.count(model.parameters)} parameters",
        "MACs": _macs(model.macs),
    }


def _macs(macs: MacFacts) -> str:
    if not macs.layers:
        return "none: no layer that multiplies weights"
    if not macs.unknown:
        return q.large(macs.known)
    lengths = ", ".join(macs.open_lengths[:3]) + (", ..." if len(macs.open_lengths) > 3 else "")
    if macs.with_ones is not None and macs.open_lengths:
        return f"{q.large(macs.with_ones)} where {lengths} = 1; else unknown"
    told = f"{q.large(macs.known)} and " if macs.known else ""
    return f"{told}unknown of {q.layers(macs.unknown)}, whose shapes are open"


def _end(end: TensorFacts) -> list[str]:
    return [
        q.shortened(end.name, 40),
        end.dtype or "unknown",
        _dims(end.dims) + (" (has a default)" if end.default else ""),
    ]


def _dims(dims: Sequence[int | str | None] | None) -> str:
    if dims is None:
        return "of unknown rank"
    return q.shortened(f"[{','.join('?' if dim is None else str(dim) for dim in dims)}]", 34)


def _operators(operators: dict[str, int], detail: int) -> str:
    shown = list(operators.items())[: None if detail else _OPERATORS]
    more = len(operators) - len(shown)
    told = ", ".join(f"{name} {q.count(count)}" for name, count in shown)
    return (told or "none") + (f", and {more} operators more (-v)" if more else "")


def _weights(model: Inspection, detail: int) -> Iterator[Line]:
    if not model.element_types:
        return
    yield ()
    yield (Span("weights", "head"),)
    rows = [["type", "tensors", "elements", "bytes"]]
    rows += [[row.dtype, q.count(row.tensors), q.count(row.elements), q.size(row.bytes)] for row in model.element_types]
    yield from table(rows, "<>>>")
    shown = model.largest if detail else model.largest[:_WEIGHTS]
    yield ()
    rows = [["largest", "type", "dims", "bytes", "zeros", "values"]]
    for weight in shown:
        zeros = "" if weight.zeros is None else f"{weight.zeros * 100:.1f} %"
        values = "" if weight.distinct is None else str(weight.distinct)
        rows.append([weight.name, weight.dtype, _dims(weight.dims), q.size(weight.bytes), zeros, values])
    used = [at for at in range(6) if at < 4 or any(row[at] for row in rows[1:])]
    rows = [[row[at] for at in used] for row in rows]
    room = WIDTH - 2 - sum(2 + max(len(row[at]) for row in rows) for at in range(1, len(used)))
    yield from table([[q.shortened(row[0], room), *row[1:]] for row in rows], "<<<" + ">" * (len(used) - 3))


def _estimates(found: Sequence[Estimate]) -> Iterator[Line]:
    yield ()
    yield (Span("what passes could win", "head"), Span(", estimated, not proven"))
    if not found:
        yield from _dim("nothing was found")
        return
    names = [each.pass_name or "-" for each in found]
    sizes = [f"-{q.size(each.bytes)}" if each.bytes else "" for each in found]
    widths = max(map(len, names)), max(map(len, sizes))
    for each, name, size in zip(found, names, sizes, strict=True):
        lead = f"  {name:<{widths[0]}}  {size:>{widths[1]}}  "
        text = each.what + (f" ({each.sample} looked at)" if each.sample else "")
        for line in textwrap.wrap(text, WIDTH - len(lead), break_on_hyphens=False):
            yield (Span(lead), Span(line))
            lead = " " * len(lead)


def _side_by_side(models: Sequence[Inspection], detail: int) -> Iterator[Line]:
    room = max(10, (WIDTH - 2 - 16) // len(models) - 2)
    rows = [["", *(q.shortened(_name(model), room) for model in models)]]
    rows += [[label, *map(value, models)] for label, value in _COMPARED]
    found = {name: max(model.operators.get(name, 0) for model in models) for each in models for name in each.operators}
    operators = sorted(found, key=lambda name: (-found[name], name))
    shown = operators if detail else operators[:_OPERATORS]
    for name in shown:
        rows.append([f"  {q.shortened(name, 20)}", *(q.count(model.operators.get(name, 0)) for model in models)])
    rows.append(["weights", *(q.size(model.weight_bytes) for model in models)])
    for kind in dict.fromkeys(row.dtype for model in models for row in model.element_types):
        sizes = [sum(row.bytes for row in model.element_types if row.dtype == kind) for model in models]
        rows.append([f"  {kind}", *(q.size(size) if size else "-" for size in sizes)])
    passes = dict.fromkeys(each.pass_name for model in models for each in model.estimates if each.bytes)
    passes.pop("", None)
    if passes:
        rows.append(["could win", *[""] * len(models)])
        rows += [[f"  {name}", *(_gain(model, name) for model in models)] for name in passes]
    yield from table(rows, "<" + ">" * len(models))
    yield from _more(len(operators) - len(shown), "operators")
    if any(model.macs.unknown and model.macs.with_ones is not None for model in models):
        yield from _dim("at 1: where every open length of the inputs is 1")
    if passes:
        yield from _dim("could win: bytes that a pass could take off the weights, estimated, not proven")


def _gain(model: Inspection, name: str) -> str:
    total = sum(each.bytes or 0 for each in model.estimates if each.pass_name == name)
    return f"-{q.size(total)}" if total else "-"


def _short_macs(macs: MacFacts) -> str:
    if not macs.unknown:
        return q.large(macs.known)
    return "unknown" if macs.with_ones is None else f"{q.large(macs.with_ones)} at 1"


_COMPARED: tuple[tuple[str, Callable[[Inspection], str]], ...] = (
    ("file", lambda model: q.size(model.file_bytes)),
    ("IR version", lambda model: str(model.ir_version)),
    ("opset", lambda model: str(model.opsets.get("", "-"))),
    ("inputs", lambda model: str(len(model.inputs))),
    ("outputs", lambda model: str(len(model.outputs))),
    ("parameters", lambda model: q.count(model.parameters)),
    ("MACs", lambda model: _short_macs(model.macs)),
    ("nodes", lambda model: q.count(model.nodes)),
)


def _name(model: Inspection) -> str:
    return Path(model.path).name if model.path else "the model"


def _more(number: int, what: str) -> Iterator[Line]:
    if number > 0:
        yield from _dim(f"and {number} {what} more (-v)")


def _dim(text: str) -> Iterator[Line]:
    yield from ((Span(line, "dim"),) for line in wrapped(text))
