"""Task metrics of both models: built in, or a function of the user's.

The names are top1, top5, nll, mse, mae, auc and agreement; `name@output` picks the output where a model has several.
`file.py:function` calls function(outputs, labels) with one dict (output name -> array) and one label array (or None)
a feed; it returns a number or a dict of numbers. Higher counts as better unless the function says otherwise by an
attribute: function.higher_is_better = False, or a dict for the numbers of a dict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxopt.errors import FeedError, UsageError, did_you_mean
from onnxopt.feeds.function import describe, load_function, split_reference
from onnxopt.runtime import Array
from onnxopt.runtime.ports import is_float, shape_text
from onnxopt.verification import scores
from onnxopt.verification.outputs import RecordedOutputs


@dataclass(frozen=True)
class Metric:
    """A figure of one model on the evaluation feeds."""

    name: str
    higher_is_better: bool
    value: float


@dataclass(frozen=True)
class MetricChange:
    """One metric of both models. share: it is a share between 0 and 1, so that a point ("pt") is a hundredth of it."""

    name: str
    higher_is_better: bool
    reference: float
    candidate: float
    share: bool = False

    @property
    def drop(self) -> float:
        """How much worse the candidate is, in the metric's own unit; negative when it is better."""
        change = self.reference - self.candidate
        return change if self.higher_is_better else -change


@dataclass(frozen=True)
class Builtin:
    """A built-in metric: whether higher is better, and whether it is a share between 0 and 1."""

    higher_is_better: bool
    share: bool


BUILTINS: dict[str, Builtin] = {
    "top1": Builtin(True, True),
    "top5": Builtin(True, True),
    "nll": Builtin(False, False),
    "mse": Builtin(False, False),
    "mae": Builtin(False, False),
    "auc": Builtin(True, True),
    "agreement": Builtin(True, True),
}
_CLASSIFIERS = ("top1", "top5", "nll")


def check_names(names: Sequence[str]) -> None:
    """Raise UsageError for a metric that is neither built in nor a reference to an existing Python file."""
    for name in names:
        reference = split_reference(name)
        if reference is not None:
            if not reference[0].is_file():
                raise UsageError(f"metric {name!r}: {reference[0]} does not exist", "name a file.py:function")
        elif name.partition("@")[0] not in BUILTINS:
            raise UsageError(
                f"unknown metric {name!r}", f"{did_you_mean(name.partition('@')[0], BUILTINS)} (or file.py:function)"
            )


def default_names(reference: RecordedOutputs) -> list[str]:
    """["top1"] where every feed has integer labels that fit a class-like output, else nothing."""
    labels = reference.labels
    if not labels or any(label is None or label.dtype.kind not in "iu" for label in labels):
        return []
    try:
        _classification(reference, "")
    except FeedError:
        return []
    return ["top1"]


def evaluate(names: Sequence[str], reference: RecordedOutputs, candidate: RecordedOutputs) -> dict[str, MetricChange]:
    """The metrics of both models, on the feeds and labels of the reference, by name.

    What an output means (which one holds the classes, whether it gives probabilities) is decided on the reference, so
    that both are measured alike. Raises FeedError when labels are missing or don't fit, UsageError for an unknown
    metric or a user's function that fails.
    """
    check_names(names)
    found: dict[str, MetricChange] = {}
    for name in names:
        user = split_reference(name)
        changes = _user(name, reference, candidate) if user is not None else [_builtin(name, reference, candidate)]
        found.update((change.name, change) for change in changes)
    return found


def measure(names: Sequence[str], outputs: RecordedOutputs) -> dict[str, Metric]:
    """The metrics of one model alone, by name (agreement is then 1)."""
    changes = evaluate(names, outputs, outputs)
    return {name: Metric(name, change.higher_is_better, change.reference) for name, change in changes.items()}


def _builtin(name: str, reference: RecordedOutputs, candidate: RecordedOutputs) -> MetricChange:
    kind, _, output = name.partition("@")
    builtin = BUILTINS[kind]
    if kind == "agreement":
        return MetricChange(name, True, 1.0, _agreement(reference, candidate, output), True)
    chosen, score = _scorer(kind, reference, output)
    ours, theirs = _column(reference, chosen, kind), _counterpart(reference, candidate, chosen, kind)
    # A candidate that gives NaN gets NaN for its figure, and no budget passes with that.
    with np.errstate(invalid="ignore", over="ignore"):
        value = math.nan if theirs is None else score(theirs)
        return MetricChange(name, builtin.higher_is_better, score(ours), value, builtin.share)


def _counterpart(reference: RecordedOutputs, candidate: RecordedOutputs, name: str, kind: str) -> Array | None:
    """The candidate's output of all feeds, or None where it is missing or has another shape in any feed."""
    if name not in candidate.names:
        return None
    for ours, theirs in zip(reference, candidate, strict=True):
        if np.shape(ours[name]) != np.shape(theirs[name]):
            return None
    return _column(candidate, name, kind)


def _scorer(kind: str, reference: RecordedOutputs, output: str) -> tuple[str, Callable[[Array], float]]:
    """The output to look at, and a function from its values on all feeds to the figure."""
    if kind in _CLASSIFIERS:
        return _classifier(kind, reference, output)
    if kind == "auc":
        return _auc(reference, output)
    labels = _labels(reference, kind)
    chosen = _choose(output, reference, lambda array: array.size == labels.size and is_float(array.dtype), kind, labels)
    error = scores.mse if kind == "mse" else scores.mae
    return chosen, lambda values: error(values.reshape(labels.shape), labels)


def _classifier(kind: str, reference: RecordedOutputs, output: str) -> tuple[str, Callable[[Array], float]]:
    chosen, labels = _classification(reference, output)
    first = _column(reference, chosen, kind)
    classes = first.shape[-1]
    if kind == "top5" and classes <= 5:
        raise FeedError(f"top5 says nothing about the {classes} classes of output {chosen!r}", "use top1")
    if labels.min() < 0 or labels.max() >= classes:
        raise FeedError(
            f"the labels lie in {labels.min()}..{labels.max()}, output {chosen!r} has the classes 0..{classes - 1}",
            "give class numbers that count from 0",
        )
    if kind == "nll":
        probabilities = scores.are_probabilities(first)
        return chosen, lambda values: scores.nll(values, labels, probabilities)
    k = 1 if kind == "top1" else 5
    return chosen, lambda values: scores.top_k(values, labels, k)


def _classification(reference: RecordedOutputs, output: str) -> tuple[str, Array]:
    """The output that holds class scores, and integer labels of its leading shape."""
    labels = _labels(reference, "a classification metric")
    if labels.dtype.kind not in "iu":
        raise FeedError(f"the labels are {labels.dtype.name}, not class numbers", "save them as integers")
    squeezed = labels.shape[:-1] if labels.shape[-1:] == (1,) else labels.shape

    def fits(array: Array) -> bool:
        classes = array.ndim >= 2 and array.shape[-1] >= 2
        return classes and is_float(array.dtype) and array.shape[:-1] in (labels.shape, squeezed)

    chosen = _choose(output, reference, fits, "a classification metric", labels)
    return chosen, labels.reshape(_column(reference, chosen, "a classification metric").shape[:-1])


def _auc(reference: RecordedOutputs, output: str) -> tuple[str, Callable[[Array], float]]:
    labels = _labels(reference, "auc").reshape(-1)
    if np.unique(labels).tolist() != [0, 1]:
        raise FeedError("auc needs labels of both classes, 0 and 1", "use top1 for more classes")

    def fits(array: Array) -> bool:
        pairs = array.ndim >= 2 and array.shape[-1] == 2 and array.size == 2 * labels.size
        return is_float(array.dtype) and (pairs or array.size == labels.size)

    def score(values: Array) -> float:
        wide = values.astype(np.float64)
        # The difference ranks logits and probabilities of two classes alike.
        single = wide if wide.size == labels.size else wide[..., 1] - wide[..., 0]
        return scores.auc(single.reshape(-1), labels)

    return _choose(output, reference, fits, "auc", labels), score


def _agreement(reference: RecordedOutputs, candidate: RecordedOutputs, output: str) -> float:
    """Share of equal answers: argmax of the last axis for floats with one, else equal elements. Of the first output."""
    chosen = output or reference.names[0]
    equal = count = 0
    for ours, theirs in zip(reference, candidate, strict=True):
        y, x = _value(ours, chosen, "agreement"), _value(theirs, chosen, "agreement")
        if is_float(y.dtype) and y.ndim and y.shape[-1] >= 2:
            y, x = (array.astype(np.float32).argmax(-1) for array in (y, x))
        count += y.size
        equal += int((y == x).sum()) if y.shape == x.shape else 0
    return equal / count if count else 1.0


def _user(name: str, reference: RecordedOutputs, candidate: RecordedOutputs) -> list[MetricChange]:
    """The metrics of a user's function: one named like the function, or one a key of the dict it returns."""
    user = split_reference(name)
    assert user is not None
    function = load_function(*user, kind=UsageError)
    direction = getattr(function, "higher_is_better", True)
    labels = reference.labels
    found = [_call(name, user[1], function, outputs, labels) for outputs in (reference, candidate)]
    if found[0].keys() != found[1].keys():
        raise UsageError(
            f"metric {name!r}: it returned other names for the candidate", "return the same keys each time"
        )
    changes = []
    for key, value in found[0].items():
        higher = direction.get(key, True) if isinstance(direction, Mapping) else bool(direction)
        share = all(0 <= number <= 1 for number in (value, found[1][key]))
        changes.append(MetricChange(key, higher, value, found[1][key], share))
    return changes


def _call(
    name: str, short: str, function: Callable[..., Any], outputs: RecordedOutputs, labels: Sequence[Array | None]
) -> dict[str, float]:
    try:
        result = function(list(outputs), list(labels))
    except Exception as error:
        raise UsageError(f"metric {name!r}: it failed: {describe(error)}", "correct the function") from error
    values = result if isinstance(result, Mapping) else {short: result}
    try:
        return {str(key): float(value) for key, value in values.items()}
    except (TypeError, ValueError):
        raise UsageError(
            f"metric {name!r}: it returned {result!r:.80}", "return a number or a dict of numbers"
        ) from None


def _labels(outputs: RecordedOutputs, kind: str) -> Array:
    """The labels of all feeds along their first axis."""
    missing = next(
        (source for source, label in zip(outputs.sources, outputs.labels, strict=True) if label is None), None
    )
    if missing is not None or not outputs.labels:
        raise FeedError(
            f"{missing or 'the feeds'}: no labels, but {kind} needs them",
            "add --labels FILE, or an array 'labels' to the .npz files",
        )
    arrays = [np.atleast_1d(label) for label in outputs.labels if label is not None]
    return _join(arrays, "the labels")


def _column(outputs: RecordedOutputs, name: str, kind: str) -> Array:
    """One output of all feeds along its first axis."""
    return _join([np.atleast_1d(_value(item, name, kind)) for item in outputs], f"output {name!r}")


def _value(item: Mapping[str, Any], name: str, kind: str) -> Array:
    if name not in item:
        raise UsageError(f"{kind}: the model has no output {name!r}", did_you_mean(name, item))
    value = item[name]
    if not isinstance(value, np.ndarray):
        raise FeedError(f"{kind}: output {name!r} is no tensor", "write a metric as file.py:function")
    return value


def _join(arrays: Sequence[Array], what: str) -> Array:
    try:
        return np.concatenate(arrays)
    except ValueError:
        shapes = sorted({shape_text(array.shape) for array in arrays})
        raise FeedError(
            f"{what} differs in shape from feed to feed ({', '.join(shapes[:3])})", "write a metric as file.py:function"
        ) from None


def _choose(output: str, reference: RecordedOutputs, fits: Callable[[Array], bool], kind: str, labels: Array) -> str:
    """The output asked for, else the first that fits. Raises FeedError when it does not, or none does."""
    seen = []
    for name in [output] if output else reference.names:
        try:
            column = _column(reference, name, kind)
        except FeedError:
            continue
        if fits(column):
            return name
        seen.append(f"{name} {shape_text(column.shape)}")
    raise FeedError(
        f"{kind}: the labels {shape_text(labels.shape)} of all feeds fit no output ({', '.join(seen) or 'no tensor'})",
        "check the labels, pick the output with metric@output, or write a metric as file.py:function",
    )
