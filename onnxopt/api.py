"""The Python face: optimize, check, calibrate, inspect, diff and others. The command line goes through these."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from onnx import ModelProto

from onnxopt.calibration.sampling import ELEMENTS
from onnxopt.calibration.storage import SavedStatistics
from onnxopt.calibration.storage import merge as merge_statistics
from onnxopt.errors import FeedError, ModelError, UsageError, did_you_mean
from onnxopt.feeds import Images, Split
from onnxopt.feeds.function import split_reference
from onnxopt.feeds.places import reads
from onnxopt.inspection.difference import Difference
from onnxopt.inspection.record import Inspection
from onnxopt.model import Limits, LimitsLike, Model
from onnxopt.model import load as load_model
from onnxopt.model.saving import PLACES
from onnxopt.pipeline import (
    Calibration,
    CalibrationRun,
    Demands,
    FeedsLike,
    Inputs,
    NamesLike,
    PassLike,
    Progress,
    Result,
    Run,
    SavedFiles,
    Settings,
    ShapesLike,
    SignatureChange,
    StatisticsLike,
    VerdictError,
    check_output,
    failed_path,
    meet,
    parse,
    reported,
    sidecars,
    silent,
)
from onnxopt.pipeline import check as check_models
from onnxopt.report import Report, check_paths, write
from onnxopt.runtime import Probe, Session
from onnxopt.target import TARGETS, Target, resolve
from onnxopt.verification import Comparison, RecordedOutputs, parse_all
from onnxopt.verification import compare as compare_outputs
from onnxopt.verification.metrics import check_names

__all__ = [
    "Calibration",
    "Difference",
    "Inspection",
    "Result",
    "SavedStatistics",
    "VerdictError",
    "calibrate",
    "check",
    "compare",
    "diff",
    "inspect",
    "load",
    "merge",
    "optimize",
]

Source: TypeAlias = str | Path | ModelProto | Model


def load(source: Source, limits: LimitsLike = "default") -> Model:
    """Load a model from a path or a ModelProto (which is not changed).

    limits: "default", "strict" or "off", see `onnxopt.model.Limits`. Raises UsageError for a missing path, ModelError
    for a file that is no valid or no safe ONNX model, LimitError for one that asks for more than `limits` allow.
    """
    return load_model(source, limits)


def optimize(
    model: Source,
    passes: PassLike | Sequence[PassLike] = (),
    feeds: FeedsLike = None,
    *,
    inputs: NamesLike = None,
    outputs: NamesLike = None,
    input_shapes: ShapesLike = None,
    opset: int | None = None,
    evaluate: FeedsLike = None,
    labels: str | Path | None = None,
    evaluate_labels: str | Path | None = None,
    images: Images | str | None = None,
    samples: int | None = None,
    batch: int = 1,
    statistics: StatisticsLike = None,
    metrics: str | Iterable[str] = (),
    target: str | Target = "auto",
    seed: int = 0,
    threads: int = 1,
    limits: LimitsLike = "default",
    latency_seconds: float = 2.0,
    compressed: bool = False,
    on_error: str = "stop",
    verify: bool = True,
    require_data: bool = False,
    output: str | Path | None = None,
    force: bool = False,
    keep_failed: bool = False,
    external_data: str = "auto",
    dry_run: bool = False,
    reports: str | Path | Iterable[str | Path] = (),
    progress: Progress = silent,
    **budgets: Any,
) -> Result:
    """Rewrite a model with passes, compare it with the original, hold it against budgets, and write it if it passes.

    model: a path, ModelProto or Model; it is not changed. passes: "prune,int8", configured passes, or both in a list.
    inputs, outputs: tensors between which a part is cut out; input_shapes: "x:1,3,224,224" or a mapping, -1 or a symbol
    for an open length. Both come before the passes: the model that they make is the one that is compared with. opset:
    the operator set to raise the model to, by the pass convert_opset in front of the others.
    feeds, evaluate, labels, images: see `onnxopt.feeds.open_feeds`; samples: at most so many of each part, drawn by
    `seed`. batch: feeds that calibration joins into one run. statistics: what `calibrate` gathered for these passes.
    limits: "default", "strict" or "off": what the model may ask for, and the process that it is run in first.
    compressed: measure compressed sizes of files above 64 MiB too.
    output: where to write; None writes nothing. external_data: weights in a file beside it "always", "never", or, with
    "auto", where they exceed 2 GB. reports: files to write the report to, .json or .txt, even where the run fails.
    force: replace an existing output or report; an input is never replaced.
    budgets: max_drop, min_sqnr, min_agreement, max_abs, max_relative, max_size, max_compressed, max_memory,
    max_load, max_latency; see `onnxopt.verification.budgets`.

    Raises VerdictError (with the result) where a budget or the quality floor fails, unless keep_failed is set;
    UsageError, ModelError, PassError, NothingCompared and LimitError as `onnxopt.errors` says. The output is written
    last, and whole or not at all.
    """
    source = _file(model)
    written = Path(output) if output is not None else None
    kept = [written, failed_path(written)] if written is not None and written.name else []
    read = [*_read(source, feeds), *_paths(evaluate, labels, evaluate_labels, statistics)]
    used = [*_files(source, *read), *kept]
    report_paths = _report_paths(reports, force, used)
    settings = Settings(
        seed=seed,
        threads=threads,
        batch=_at_least_one("batch", batch),
        on_error=_choice("on_error", on_error, ("stop", "skip")),
        verify=verify,
        require_data=require_data,
        latency_seconds=latency_seconds,
        compressed=compressed,
        keep_failed=keep_failed,
        external_data=_choice("external_data", external_data, PLACES),
        dry_run=dry_run,
    )
    change = SignatureChange.of(inputs, outputs, input_shapes)
    alone = not passes and (bool(change) or opset is not None)
    raising = [] if opset is None else parse(f"convert_opset:opset={opset}")
    steps = [*raising, *([] if alone else parse(passes))]
    saved = SavedFiles(statistics)
    demands = _demands(budgets, metrics, settings)
    chosen = _target(target)
    bounds = Limits.of(limits)
    given = Inputs(feeds, evaluate, labels, evaluate_labels, images, samples, seed)
    with reported(report_paths, "optimize", source, None):
        progress("loading", 0, 0)
        reference = load(model, bounds)
        _check_opset(opset, reference)
        if change:
            _load_apart(reference, source, bounds)
        reference, changes = change.apply(reference)
        demands.check_outputs(reference)
        saved.check(reference)
        _spare_sidecars(report_paths, source)
        if written is not None and not dry_run:
            for place in kept if keep_failed else kept[:1]:
                check_output(place, source, force)
                _spare_inputs(place, read)
        opened = _meet(reference, source, changes, given, bounds, threads, progress)
        opened = saved.like_measured(opened, seed)
    work = (reference, source, steps, opened, chosen, demands, settings)
    run = Run(*work, changes, written, report_paths, saved, progress)
    return run.execute()


def calibrate(
    model: Source,
    feeds: FeedsLike = None,
    *,
    passes: PassLike | Sequence[PassLike] = "int8",
    images: Images | str | None = None,
    samples: int | None = None,
    batch: int = 1,
    elements: int | None = ELEMENTS,
    shard: tuple[int, int] | None = None,
    statistics: StatisticsLike = None,
    target: str | Target = "auto",
    seed: int = 0,
    threads: int = 1,
    limits: LimitsLike = "default",
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Calibration:
    """Gather the statistics that the first of the passes asks for which asks for any, for `optimize(statistics=...)`.

    model, images: see `optimize`. feeds: all of them calibrate, of a folder that is parted already its fit part;
    samples: at most so many, drawn by `seed`. batch: feeds joined into one run. elements: how many of each tensor, for
    each item of a batch, histograms look at; None for all. shard: (i, n): only every n-th sample, from the i-th on; the
    n parts together are all, see `merge`. statistics: of earlier passes. output: a file to write them to; force:
    replace it.
    Raises NothingCompared without real inputs, UsageError where no pass asks for statistics, FeedError naming a sample
    that can't be read, that the model fails on, or that holds NaN; ModelError, PassError, LimitError as in `optimize`.
    """
    source = _file(model)
    written = Path(output) if output is not None else None
    settings = Settings(seed=seed, threads=threads, batch=_at_least_one("batch", batch))
    steps = parse(passes)
    saved = SavedFiles(statistics)
    _check_calibration(elements, shard, samples)
    chosen = _target(target)
    bounds = Limits.of(limits)
    inputs = Inputs(feeds, images=images, samples=samples, seed=seed)
    if written is not None:
        check_output(written, source, force)
        _spare_inputs(written, [*_read(source, feeds), *_paths(statistics)])
    progress("loading", 0, 0)
    reference = load(model, bounds)
    saved.check(reference)
    split = meet(reference, source, inputs, bounds, fit=True, threads=threads, progress=progress)
    name = "a model in memory" if source is None else source.name
    run = CalibrationRun(reference, name, steps, split, chosen, settings, saved, elements, shard, progress)
    calibration = run.execute()
    if written is not None:
        progress("writing", 0, 0)
        calibration.saved.save(written)
    return calibration


def inspect(model: Source, *, limits: LimitsLike = "default", progress: Progress = silent) -> Inspection:
    """What a model holds, and what passes could win on it, estimated. Nothing is written or changed.

    The model is loaded by the runtime first, in a process of its own; where that refuses it, no pass is tried. Raises
    UsageError, ModelError and LimitError as `load` and `optimize` do.
    """
    source, bounds = _file(model), Limits.of(limits)
    progress("loading", 0, 0)
    loaded = load(model, bounds)
    progress("running it in a process of its own", 0, 0)
    refused = ""
    try:
        _load_apart(loaded, source, bounds)
    except ModelError as error:
        refused = error.cause
    progress("looking at it", 0, 0)
    from onnxopt.inspection.inspect import inspect_model  # loaded when asked for: other commands start sooner

    return inspect_model(loaded, source, refused)


def diff(a: Source, b: Source, *, limits: LimitsLike = "default", progress: Progress = silent) -> Difference:
    """How model `b` differs from model `a`: nodes, weights, signature, metadata. Nothing is run, written or changed.

    Nodes are matched by what they compute, by names and by place, so that what was merely renamed counts as equal.
    Raises UsageError, ModelError and LimitError as `load` does.
    """
    bounds = Limits.of(limits)
    progress("loading", 0, 0)
    models = load(a, bounds), load(b, bounds)
    progress("comparing", 0, 0)
    from onnxopt.inspection.compare import compare_models  # loaded when asked for: other commands start sooner

    return compare_models(*models, (_file(a), _file(b)))


def merge(
    files: str | Path | Sequence[str | Path], *, output: str | Path | None = None, force: bool = False
) -> SavedStatistics:
    """The statistics of all files together: the parts of one calibration, or several over different feeds.

    output: a file to write them to; force: replace it. Raises UsageError, naming the file, for parts that are missing
    or given twice and for files that don't belong together.
    """
    paths = _files(files)
    written = Path(output) if output is not None else None
    if written is not None:
        check_output(written, None, force)
        _spare_inputs(written, paths)
    merged = merge_statistics(paths)
    if written is not None:
        merged.save(written)
    return merged


def check(
    candidate: Source,
    reference: Source,
    feeds: FeedsLike = None,
    budgets: Mapping[str, Any] | None = None,
    *,
    evaluate: FeedsLike = None,
    labels: str | Path | None = None,
    evaluate_labels: str | Path | None = None,
    images: Images | str | None = None,
    samples: int | None = None,
    metrics: str | Iterable[str] = (),
    seed: int = 0,
    threads: int = 1,
    limits: LimitsLike = "default",
    latency_seconds: float = 2.0,
    compressed: bool = False,
    reports: str | Path | Iterable[str | Path] = (),
    force: bool = False,
    progress: Progress = silent,
    **more_budgets: Any,
) -> Report:
    """Hold a candidate against a reference on real inputs; the report's verdict and exit_code are the answer.

    feeds: all of them are compared, none is kept for calibration; a folder that is parted already gives its evaluate
    part. budgets: kind -> limit, or as keywords; without one on quality, the quality floor is held. compressed: measure
    compressed sizes of files above 64 MiB too. reports: files to write the report to, .json or .txt; force: replace
    existing ones.
    Raises NothingCompared without real inputs, and UsageError, ModelError and LimitError as `onnxopt.errors` says.
    """
    files = _file(candidate), _file(reference)
    report_paths = _report_paths(reports, force, _files(*files, feeds, evaluate, labels, evaluate_labels))
    settings = Settings(seed=seed, threads=threads, latency_seconds=latency_seconds, compressed=compressed)
    demands = _demands({**(budgets or {}), **more_budgets}, metrics, settings)
    bounds = Limits.of(limits)
    inputs = Inputs(feeds, evaluate, labels, evaluate_labels, images, samples, seed)
    with reported(report_paths, "check", files[1], files[0]):
        progress("loading", 0, 0)
        models = load(candidate, bounds), load(reference, bounds)
        demands.check_outputs(models[1])
        _spare_sidecars(report_paths, *files)
        others = [(models[0], files[0])]
        split = meet(
            models[1], files[1], inputs, bounds, whole=True, candidates=others, threads=threads, progress=progress
        )
        report = check_models(*models, split, demands, settings, paths=files, progress=progress)
    for path in report_paths:
        write(report, path)
    return report


def compare(
    reference: Source,
    candidate: Source,
    feeds: FeedsLike = None,
    *,
    labels: str | Path | None = None,
    images: Images | str | None = None,
    seed: int = 0,
    threads: int = 1,
    limits: LimitsLike = "default",
    progress: Progress = silent,
) -> Comparison:
    """Run both models on all feeds, optimized as they would be deployed, and measure every output.

    Raises FeedError, ModelError or PassError when feeds can't be read, a model can't be loaded, or a run fails.
    """
    bounds = Limits.of(limits)
    models = load(reference, bounds), load(candidate, bounds)
    inputs = Inputs(feeds, labels=labels, images=images, seed=seed)
    others = [(models[1], _file(candidate))]
    split = meet(models[0], _file(reference), inputs, bounds, whole=True, candidates=others, threads=threads)
    recorded = RecordedOutputs(Session(models[0], threads=threads), split.evaluate)
    return compare_outputs(
        recorded,
        Session(models[1], threads=threads),
        progress=lambda done, total: progress("comparing", done, total),
    )


def _load_apart(model: Model, path: Path | None, limits: Limits) -> None:
    """Infer shapes of a model from outside, and load it, in a process that may be killed, before that is done here."""
    with Probe(model, path, limits):
        pass


def _check_opset(opset: int | None, model: Model) -> None:
    if opset is not None and model.opset > opset:
        raise UsageError(
            f"opset: the model uses operator set {model.opset}, and it is only raised, never lowered, to {opset}",
            f"use {model.opset} or more, or export the model for {opset}",
        )


def _meet(
    reference: Model,
    source: Path | None,
    changes: Sequence[str],
    inputs: Inputs,
    limits: Limits,
    threads: int,
    progress: Progress,
) -> Split:
    """See `meet`; a reference that was changed lies in no file, and feeds beside the file need not fit it."""
    if not changes:
        return meet(reference, source, inputs, limits, threads=threads, progress=progress)
    note = ""
    if source is not None and inputs.feeds is None:
        try:
            return meet(reference, None, inputs, limits, beside=source, threads=threads, progress=progress)
        except FeedError:
            note = "what lies beside the model does not fit the changed inputs"
    try:
        opened = meet(reference, None, inputs, limits, threads=threads, progress=progress)
    except FeedError as error:
        if inputs.feeds is not None:
            raise
        raise UsageError(
            f"the changed model ({'; '.join(changes)}) can't be run: {error.cause}",
            "give dims that the graph can compute with, or real inputs of them with --data",
        ) from error
    return replace(opened, note="; ".join(filter(None, (opened.note, note))))


def _file(source: Source) -> Path | None:
    return Path(source) if isinstance(source, (str, Path)) else None


def _demands(budgets: Mapping[str, Any], metrics: str | Iterable[str], settings: Settings) -> Demands:
    if not 0 <= settings.latency_seconds < math.inf:
        raise UsageError(
            f"latency_seconds: {settings.latency_seconds} is no time that could be spent",
            "give seconds, 0 for no timing",
        )
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    wanted = [part.strip() for name in names for part in name.split(",")]
    check_names(wanted)
    demands = Demands(tuple(parse_all(budgets)), tuple(wanted))
    demands.check(settings)
    return demands


def _target(target: str | Target) -> Target:
    try:
        return resolve(target)
    except ValueError as error:
        hint = did_you_mean(str(target), ["auto", *TARGETS])
        raise UsageError(f"unknown target {target!r}", hint) from error


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise UsageError(f"{name}: {value} is no number of feeds", "use 1 or more")
    return value


def _check_calibration(elements: int | None, shard: tuple[int, int] | None, samples: int | None) -> None:
    if elements is not None and elements < 1:
        raise UsageError(f"elements: {elements} is too few", "use 1 or more, or None for all")
    if samples is not None and samples < 1:
        raise UsageError(f"samples: {samples} is too few", "use 1 or more")
    if shard is not None and shard[1] < 1:
        raise UsageError(f"shard {shard[0]}/{shard[1]}: there are no parts", "use for example 1/4")
    if shard is not None and not 0 <= shard[0] <= shard[1]:
        raise UsageError(
            f"shard {shard[0]}/{shard[1]}: there is no such part", f"use 1/{shard[1]} to {shard[1]}/{shard[1]}"
        )


def _spare_inputs(written: Path, read: Iterable[str | Path]) -> None:
    """Refuse to replace a file that is read, or to add one to a folder of feeds. Raises UsageError."""
    named = next((item for item in read if reads(item, written)), None)
    if named is None:
        return
    cause = "is read by this run" if written.exists() else f"would be read as one of the feeds in {named}"
    raise UsageError(f"{written} {cause}", "choose another place with -o")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UsageError(f"{name}: {value!r} is not among its values", f"use one of: {', '.join(choices)}")
    return value


def _report_paths(reports: str | Path | Iterable[str | Path], force: bool, used: Iterable[Path]) -> list[Path]:
    paths = [Path(path) for path in ([reports] if isinstance(reports, (str, Path)) else reports)]
    check_paths(paths, force=force, taken=used)
    return paths


def _spare_sidecars(reports: list[Path], *models: Path | None) -> None:
    """Refuse reports that would replace external data of a model. Raises UsageError."""
    check_paths(reports, force=True, taken=[file for path in models if path is not None for file in sidecars(path)])


def _read(source: Path | None, feeds: FeedsLike) -> list[str | Path]:
    """What feeds are read from: what is named, or else may lie beside the model."""
    if feeds is None and source is not None:
        return [source.parent / f"{source.stem}.feeds.npz"]
    return _paths(feeds)


def _files(*sources: Any) -> list[Path]:
    """The files and folders among models, feeds, labels and statistics; lists are looked into."""
    references = [(path, split_reference(str(path))) for path in _paths(*sources)]
    return [Path(path) if reference is None else reference[0] for path, reference in references]


def _paths(*sources: Any) -> list[str | Path]:
    """What is named by a path or as file.py:function; lists are looked into."""
    found: list[str | Path] = []
    for source in sources:
        if isinstance(source, (str, Path)):
            found.append(source)
        elif isinstance(source, (list, tuple)):
            found += _paths(*source)
    return found
