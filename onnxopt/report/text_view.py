"""The report for the eye, in 80 columns. Lines are made of spans with a role, so that a terminal may colour them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from onnxopt.passbase import Change, Skip
from onnxopt.report import quantities as q
from onnxopt.report.layout import WIDTH, Line, Span, joined
from onnxopt.report.layout import table as _table
from onnxopt.report.layout import wrapped as _wrapped
from onnxopt.report.record import (
    ComparisonFigures,
    FootprintFigures,
    KernelFigures,
    LatencyFigures,
    LayerFigures,
    LoadFigures,
    OutputFigures,
    PassRecord,
    QuantizationFigures,
    Report,
    SaturationFigures,
    Status,
    Verdict,
)

# how many nodes are named behind a count
_NAMED = 3
# how many reasons for leaving nodes alone
_REASONS = 10
# how many layers are shown with their SQNR
_LAYERS = 5
# below so many paired rounds an interval holds all of them
_ENOUGH = 6
_GOOD = (Verdict.PASSED, Verdict.SYNTHETIC, Verdict.UNCHANGED)


def plain(report: Report, detail: int = 0) -> str:
    """The report as text that ends with a newline. detail: see `lines`."""
    return joined(lines(report, detail))


def lines(report: Report, detail: int = 0) -> Iterator[Line]:
    """The report's lines. detail: 0 counts changes and names the first few nodes, 1 lists every change and skip."""
    sections = [
        _models(report, detail),
        _passes(report.passes),
        _changes(report.passes) if detail else [],
        _skips(report.passes, detail),
        _notes(report.passes),
        _quantization(report.quantization, detail),
        _comparison(report.comparison),
        _feeds(report),
        _budgets(report),
        _warnings(report),
        _verdict(report),
    ]
    first = True
    for section in sections:
        made = list(section)
        if made and not first:
            yield ()
        if made:
            first = False
        yield from made


def _models(report: Report, detail: int) -> Iterator[Line]:
    yield (Span(_title(report), "head"),)
    if report.reference_changes:
        changed = f"original: {'; '.join(report.reference_changes)}"
        yield from ((Span(line),) for line in _wrapped(changed))
    before, after = report.reference, report.candidate
    if after is None:
        return
    taken = [
        ["", "original", "result", "ratio"],
        ["file", q.size(before.file_bytes), q.size(after.file_bytes), q.ratio(before.file_bytes, after.file_bytes)],
        *_footprint(report.footprint),
        *_times("load", report.footprint.load if report.footprint is not None else None),
        *_times("latency", report.latency),
    ]
    parameters, nodes = (before.parameters, after.parameters), (before.nodes, after.nodes)
    held = [
        ["", "", "", "change"],
        ["parameters", *map(q.count, parameters), q.change(*parameters)],
        ["nodes", *map(q.count, nodes), q.change(*nodes)],
        *(
            [metric.name, q.metric(metric, metric.reference), q.metric(metric, metric.candidate), q.drop(metric)]
            for metric in report.metrics
        ),
    ]
    table = list(_table([*taken, *held], "<>>>", headers=(0, len(taken))))
    for part in (table[: len(taken)], table[len(taken) :]):
        yield ()
        yield from part
    told = [*_measured_how(report), *(_not_measured(report.footprint, report.latency is not None, detail))]
    if told:
        yield ()
        yield from ((Span(line, "dim"),) for text in told for line in _wrapped(text))


def _footprint(figures: FootprintFigures | None) -> Iterator[list[str]]:
    """Rows of what is measured of both models."""
    if figures is None:
        return
    one, two = figures.reference, figures.candidate
    for name, before, after in (
        ("zip", one.deflate_bytes, two.deflate_bytes),
        ("zstd", one.zstd_bytes, two.zstd_bytes),
    ):
        if before is not None and after is not None:
            yield [name, q.size(before), q.size(after), q.ratio(before, after)]
    memory = figures.memory
    if memory is not None:
        taken = memory.reference_bytes, memory.candidate_bytes
        equal = abs(taken[1] - taken[0]) <= memory.noise_bytes
        yield ["memory", *map(q.size, taken), "same" if equal else q.ratio(*taken)]


def _times(name: str, figures: LatencyFigures | LoadFigures | None) -> Iterator[list[str]]:
    if figures is not None:
        times = map(q.milliseconds, (figures.reference_ms, figures.candidate_ms))
        yield [name, *times, q.times(figures.ratio)]


def _measured_how(report: Report) -> Iterator[str]:
    memory = report.footprint.memory if report.footprint is not None else None
    if memory is not None and memory.loads:
        loads = "one load" if memory.loads == 1 else f"median of {q.count(memory.loads)} loads"
        yield f"memory: {loads}; a difference up to {q.size(memory.noise_bytes)} is noise"
    load = report.footprint.load if report.footprint is not None else None
    if load is not None:
        yield f"load: {_interval(load)}"
    if report.latency is not None:
        threads = "1 thread" if report.latency.threads == 1 else f"{report.latency.threads} threads"
        yield f"latency: {_interval(report.latency)}, {threads}"


def _interval(figures: LatencyFigures | LoadFigures) -> str:
    if figures.pairs == 1:
        return "one paired round"
    level = " (95 %)" if figures.pairs >= _ENOUGH else ""
    return f"median of {q.count(figures.pairs)} paired rounds, {figures.low:.3f} to {figures.high:.3f}{level}"


def _not_measured(figures: FootprintFigures | None, timed: bool, detail: int) -> Iterator[str]:
    """Why rows are missing. A reason that the user knows of is left out: that nothing was to be timed."""
    reasons: dict[str, list[str]] = {}
    for figure, reason in (figures.unmeasured if figures is not None else {}).items():
        reasons.setdefault(reason, []).append(figure)
    for reason, missing in reasons.items():
        if detail or "zip" in missing or (timed and missing != ["zstd"]):
            yield f"{', '.join(missing)} not measured: {reason}"


def _title(report: Report) -> str:
    name = Path(report.reference.path).name if report.reference.path else "the model"
    if report.command == "check":
        other = report.candidate.path if report.candidate is not None and report.candidate.path else "the candidate"
        return f"{Path(other).name} held against {name}"
    saved = report.candidate.path if report.candidate is not None else None
    return f"{name} -> {Path(saved).name}" if saved else name


def _passes(records: Sequence[PassRecord]) -> Iterator[Line]:
    if not records:
        return
    yield (Span("passes", "head"),)
    labels = [_label(record) for record in records]
    width = min(max(map(len, labels)), 38)
    for record, label in zip(records, labels, strict=True):
        seconds = f"{record.seconds + record.verify_seconds:.1f} s"
        room = WIDTH - 2 - width - 2 - 10 - len(seconds) - 1
        effect = record.effect if record.status is Status.CHANGED else ""
        what, role = _outcome(record)
        lead = f"  {label:<{width}}  "
        if len(label) > width:
            yield from ((Span(line),) for line in _wrapped(label, break_words=True))
            lead = " " * (width + 4)
        first, *more = textwrap.wrap(what, room) or [""]
        yield (Span(lead), Span(f"{first:<{room}}", role), Span(f"{effect:>9} {seconds:>{len(seconds)}}", "dim"))
        for line in more:
            yield (Span(" " * (width + 4)), Span(line, role))


def _label(record: PassRecord) -> str:
    return f"{record.text} (for {record.inserted_for})" if record.inserted_for else record.text


def _outcome(record: PassRecord) -> tuple[str, str]:
    if record.status is Status.FAILED:
        return "failed, rolled back", "bad"
    if record.status is Status.UNDONE:
        return "undone: it only prepared", "dim"
    if record.status is Status.UNCHANGED:
        return "nothing to do", "dim"
    counts: dict[str, int] = {}
    for change in record.changes:
        counts[change.kind] = counts.get(change.kind, 0) + change.count
    return ", ".join(f"{number} {kind}" for kind, number in counts.items()) or "changed", "plain"


def _changes(records: Sequence[PassRecord]) -> Iterator[Line]:
    for record in records:
        if record.changes:
            yield (Span(f"changes of {record.name}", "head"),)
            yield from ((Span(line),) for change in record.changes for line in _wrapped(_change(change)))


def _change(change: Change) -> str:
    return f"{change.kind} {change.where}" + (f": {change.detail}" if change.detail else "")


def _skips(records: Sequence[PassRecord], detail: int) -> Iterator[Line]:
    groups = [(record.name, *group) for record in records for group in _by_reason(record.skipped)]
    if not groups:
        return
    yield (Span("left alone", "head"),)
    shown = groups if detail else groups[:_REASONS]
    for name, reason, nodes in shown:
        named = len(nodes) if detail else _NAMED
        listed = ", ".join(nodes[:named]) + (", ..." if len(nodes) > named else "")
        yield from ((Span(line),) for line in _wrapped(f"{name}: {q.count(len(nodes))} x {reason}: {listed}"))
    if len(groups) > len(shown):
        yield (Span(f"  and {len(groups) - len(shown)} reasons more; -v lists them", "dim"),)


def _by_reason(skipped: Iterable[Skip]) -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for skip in skipped:
        groups.setdefault(skip.reason, []).append(skip.node)
    return sorted(groups.items(), key=lambda entry: -len(entry[1]))


def _notes(records: Sequence[PassRecord]) -> Iterator[Line]:
    noted = [f"{record.name}: {note}" for record in records for note in record.notes]
    if noted:
        yield (Span("notes", "head"),)
        yield from ((Span(line),) for note in noted for line in _wrapped(note))


def _quantization(figures: QuantizationFigures | None, detail: int) -> Iterator[Line]:
    if figures is None:
        return
    yield (Span("kernels", "head"),)
    told = [
        *(_kernels(figures.kernels, detail) if figures.kernels is not None else ()),
        *(_saturation(figures.saturation, detail) if figures.saturation is not None else ()),
        *((f"not proven: {note}", "warn") for note in figures.notes),
    ]
    yield from ((Span(line, role),) for text, role in told for line in _wrapped(text))
    yield from _layers(figures, detail)


def _kernels(figures: KernelFigures, detail: int) -> Iterator[tuple[str, str]]:
    """(text, role) of each sentence."""
    listed = ", ".join(f"{kernel} {q.count(number)}" for kernel, number in figures.kernels.items())
    role = "plain" if figures.integer == figures.layers else "warn"
    running = f"{q.count(figures.integer)} of {q.layers(figures.layers, 'quantized')} run on integer kernels"
    yield f"{running}{f': {listed}' if listed else ''}", role
    groups: dict[str, list[str]] = {}
    for layer in figures.unfused:
        groups.setdefault(f"{layer.operator}: {layer.reason}", []).append(layer.name)
    for reason, names in groups.items():
        yield f"not fused: {q.count(len(names))} x {reason}: {_named(names, detail)}", "warn"
    if figures.between_codes:
        count = q.count(len(figures.between_codes))
        yield f"on floats between codes: {count} x {_named(figures.between_codes, detail)}", "warn"
    nodes = f"{q.count(figures.quantize_nodes)} QuantizeLinear, {q.count(figures.dequantize_nodes)} DequantizeLinear"
    floats = f"{q.layers(figures.float_layers)} left on floats; " if figures.float_layers else ""
    yield f"{floats}conversions left: {nodes}", "plain"


def _saturation(figures: SaturationFigures, detail: int) -> Iterator[tuple[str, str]]:
    unread = f"; {q.count(figures.unread)} could not be looked at" if figures.unread else ""
    if not figures.risks:
        looked = f" ({q.count(figures.checked)} looked at)" if figures.checked else ""
        yield f"no layer can saturate{looked}{unread}", "plain"
        return
    names = _named([risk.name for risk in figures.risks], detail)
    yield (
        f"{q.count(len(figures.risks))} of {q.layers(figures.checked)} can saturate without VNNI: {names}{unread}",
        "warn",
    )
    measured = [risk for risk in figures.risks if risk.outputs is not None]
    if not measured:
        return
    reach = sum(bool(risk.reachable) for risk in measured)
    wrong, outputs = (sum(risk.differing or 0 for risk in measured), sum(risk.outputs or 0 for risk in measured))
    text = f"{reach} of {len(measured)} with the codes of {q.samples(figures.samples)}"
    yield f"{text}; {q.count(wrong)} of {q.count(outputs)} outputs do", "warn" if wrong else "plain"


def _layers(figures: QuantizationFigures, detail: int) -> Iterator[Line]:
    if not figures.layers:
        return
    worst: list[LayerFigures] = sorted(figures.layers, key=lambda layer: layer.sqnr_db)
    shown = worst if detail else worst[:_LAYERS]
    more = f", {q.count(figures.unmeasured)} not measured" if figures.unmeasured else ""
    head = f"lowest SQNR of {q.layers(len(worst))} on {q.samples(figures.samples)}{more}"
    rows = [["layer", "type", "SQNR", "its input"]]
    rows += [[layer.name, layer.operator, q.decibels(layer.sqnr_db), q.decibels(layer.input_db)] for layer in shown]
    room = WIDTH - 2 - sum(2 + max(len(row[at]) for row in rows) for at in (1, 2, 3))
    yield (Span(f"  {head}"),)
    yield from _table([[q.shortened(row[0], room), *row[1:]] for row in rows], "<<>>")


def _named(names: Sequence[str], detail: int) -> str:
    """The first few names, with `detail` all."""
    named = len(names) if detail else _NAMED
    return ", ".join(names[:named]) + (", ..." if len(names) > named else "")


def _comparison(comparison: ComparisonFigures | None) -> Iterator[Line]:
    if comparison is None:
        return
    head = f"closeness to {comparison.against}, {q.samples(comparison.samples)}"
    yield (Span(head, "head"), Span(f", held to: {comparison.rule}"))
    shown = sorted(comparison.outputs, key=lambda output: output.problem is None)
    rows = [["output", "type", "SQNR", "max |d|", "of max |y|", "argmax", "equal"]]
    rows += [_figures(output) for output in shown[:12]]
    used = [at for at in range(7) if at < 2 or any(row[at] for row in rows[1:])]
    rows = [[row[at] for at in used] for row in rows]
    room = WIDTH - 2 - sum(2 + max(len(row[at]) for row in rows) for at in range(1, len(used)))
    rows = [[q.shortened(row[0], room), *row[1:]] for row in rows]
    yield from _table(rows, "<<" + ">" * (len(used) - 2))
    if len(shown) > 12:
        yield (Span(f"  and {len(shown) - 12} outputs more", "dim"),)
    for output in shown:
        if output.problem is not None:
            yield from ((Span(line, "bad"),) for line in _wrapped(f"{output.name}: {output.problem}"))


def _figures(output: OutputFigures) -> list[str]:
    return [
        output.name,
        output.dtype,
        q.decibels(output.sqnr_db),
        q.figure(output.max_abs, ".2e"),
        q.figure(output.max_rel, ".1e"),
        q.share(output.argmax_agreement),
        q.share(output.agreement),
    ]


def _feeds(report: Report) -> Iterator[Line]:
    facts = report.feeds
    if facts is None:
        return
    role = "warn" if facts.synthetic else "plain"
    yield (Span("inputs", "head"),)
    yield from ((Span(line, role),) for line in _wrapped(facts.note))


def _budgets(report: Report) -> Iterator[Line]:
    if not report.budgets:
        return
    yield (Span("budgets", "head"),)
    words = {True: "kept", False: "BROKEN", None: "undecided"}
    yield from _table([[b.name, b.limit, b.measured, words[b.passed]] for b in report.budgets], "<<<<", headers=())
    for budget in report.budgets:
        if budget.detail:
            yield from ((Span(line, "dim"),) for line in _wrapped(f"{budget.name}: {budget.detail}"))


def _warnings(report: Report) -> Iterator[Line]:
    if report.warnings:
        yield (Span("warnings", "warn"),)
        yield from ((Span(line, "warn"),) for warning in report.warnings for line in _wrapped(warning))


def _verdict(report: Report) -> Iterator[Line]:
    role = "good" if report.verdict in _GOOD else "warn" if report.verdict is Verdict.NOT_VERIFIED else "bad"
    reason = f": {report.reason}" if report.reason else ""
    first, *more = textwrap.wrap(f"{report.verdict.value}{reason}", WIDTH - 10, break_long_words=False)
    yield (Span("verdict   ", "head"), Span(first, role))
    yield from ((Span(" " * 10), Span(line, role)) for line in more)
    if report.candidate is not None and report.candidate.path and report.command == "optimize":
        yield (Span("written   ", "head"), Span(report.candidate.path))
    yield (Span("time      ", "head"), Span(f"{report.seconds:.1f} s"))
