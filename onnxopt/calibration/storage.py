"""Statistics as a file: an .npz of plain arrays and one text of JSON, keyed to the graph that was measured.

Per kind of statistic and field of its tally one array `KIND/FIELD`, the values of all subjects one after the other, and
`KIND/FIELD.shapes`, one row a subject. `meta` says which subjects these are, and where the figures come from. Equal
figures give equal bytes: subjects are in order of their names, archive members carry no time.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.calibration.requests import Requests
from onnxopt.calibration.statistics import Statistics, Subject
from onnxopt.calibration.tallies import KINDS, HistogramTally, Tally, merge_all
from onnxopt.errors import UsageError
from onnxopt.model import Model, Node, Variable
from onnxopt.model.saving import write_atomically
from onnxopt.numerics.histogram import Histogram

FORMAT = 1
_EPOCH = (1980, 1, 1, 0, 0, 0)
_AGAIN = "gather it again with onnxopt calibrate"
# kinds that are of a tensor and an axis (and a threshold)
_DETAILS = {"channel_ranges": 1, "channel_means": 1, "channel_moments": 1, "channel_grams": 1, "firings": 2}
# (index of the body, name of the tensor or of the node's first output, axis, threshold)
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Provenance:
    """What was measured, on what.

    model: name of the file; model_digest, graph_digest: `Model.content_digest` of the model as it was read and of the
    graph that was measured; graph: the passes in between, in words. elements: see `collect`. feeds: sum of the digests
    of all samples modulo 2**128, whatever their order. shard: (index, count) of a part, None for a whole.
    """

    model: str
    model_digest: str
    graph_digest: str
    graph: str
    elements: int | None
    feeds: int
    shard: tuple[int, int] | None = None


@dataclass
class SavedStatistics:
    """Statistics apart from the model they were gathered on. asked: what was asked for, by kind; see `bind`."""

    provenance: Provenance
    samples: int
    runs: int
    asked: dict[str, list[Key]]
    tallies: dict[tuple[str, Key], Tally] = field(default_factory=dict)
    reasons: dict[tuple[str, Key], str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model, requests: Requests, statistics: Statistics, provenance: Provenance) -> SavedStatistics:
        """Take what was measured of `model`."""
        keys = _Keys(model)
        return cls(
            provenance,
            statistics.samples,
            statistics.runs,
            {kind: sorted(map(keys.key, asked), key=_order) for kind, asked in requests.by_kind().items() if asked},
            {(kind, keys.key(subject)): tally for kind, subject, tally in statistics.tallies()},
            {(kind, keys.key(subject)): reason for kind, subject, reason in statistics.reasons()},
        )

    def bind(self, model: Model) -> Statistics:
        """The statistics for a model whose graph is the one that was measured."""
        subjects = _Keys(model)
        statistics = Statistics()
        statistics.samples, statistics.runs = self.samples, self.runs
        for (kind, key), tally in self.tallies.items():
            statistics.record(kind, subjects.subject(kind, key), tally)  # never written to: a merge makes new ones
        for (kind, key), reason in self.reasons.items():
            statistics.record_skip(subjects.subject(kind, key), reason, kind)
        return statistics

    def lacks(self, model: Model, requests: Requests) -> list[str]:
        """Kinds of statistics that `requests` ask of `model` and that were not asked for when these were gathered."""
        keys = _Keys(model)
        return [
            kind
            for kind, wanted in requests.by_kind().items()
            if not {keys.key(subject) for subject in wanted} <= set(self.asked.get(kind, ()))
        ]

    def histograms(self, names: Iterable[str]) -> dict[str, Histogram]:
        """Name -> histogram of the main graph's tensors of these names, as far as they were measured."""
        found = {name: self.tallies.get(("histograms", (0, name))) for name in names}
        return {name: tally.histogram() for name, tally in found.items() if isinstance(tally, HistogramTally)}

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises UsageError when the place can't be written."""
        write_atomically(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of the file."""
        meta = {
            "format": FORMAT,
            **asdict(self.provenance),
            "feeds": f"{self.provenance.feeds:032x}",
            "samples": self.samples,
            "runs": self.runs,
            "asked": self.asked,
            "measured": {},
            "skipped": sorted([kind, list(key), reason] for (kind, key), reason in self.reasons.items()),
        }
        arrays: dict[str, npt.NDArray[Any]] = {}
        for kind in KINDS:
            keys = sorted((key for other, key in self.tallies if other == kind), key=_order)
            if keys:
                meta["measured"][kind] = keys
                arrays |= _stacked(kind, [self.tallies[kind, key].arrays() for key in keys])
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            _write(archive, "meta", np.array(json.dumps(meta, sort_keys=True)))
            for name, array in arrays.items():
                _write(archive, name, array)
        return buffer.getvalue()

    @classmethod
    def load(cls, path: Path) -> SavedStatistics:
        """Read a file that `save` wrote. Raises UsageError, naming it, for anything else."""
        if not path.is_file():
            raise UsageError(
                f"{path}: no such file", "gather statistics with onnxopt calibrate MODEL --data ... -o FILE"
            )
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return _read({name: archive[name] for name in archive.files})
        except _Foreign as error:
            raise UsageError(f"{path}: {error}", _AGAIN) from error
        except Exception as error:  # readers of archives, arrays and JSON raise a dozen classes for damaged files
            raise UsageError(f"{path}: it holds no statistics: {_one_line(error)}", _AGAIN) from error

    def merged(self, other: SavedStatistics) -> SavedStatistics:
        """Both together, over other feeds of the same graph."""
        asked = {kind: list(keys) for kind, keys in self.asked.items()}
        result = SavedStatistics(self.provenance, self.samples + other.samples, self.runs + other.runs, asked)
        result.tallies, result.reasons = dict(self.tallies), dict(self.reasons)
        merge_all(result.tallies, result.reasons, other.tallies, other.reasons)
        feeds = (self.provenance.feeds + other.provenance.feeds) % (1 << 128)
        result.provenance = replace(self.provenance, feeds=feeds)
        return result


def merge(paths: Sequence[Path]) -> SavedStatistics:
    """The statistics of all files together.

    Either all shards of one calibration, or whole calibrations over different feeds. Raises UsageError, naming the
    file, for shards that are missing or given twice, for files of different graphs or requests, and for equal feeds.
    """
    if not paths:
        raise UsageError("there is nothing to merge", "name two or more files of statistics")
    files = [(path, SavedStatistics.load(path)) for path in paths]
    _check_alike(files)
    shards = [(path, saved.provenance.shard) for path, saved in files]
    if any(shard is not None for _, shard in shards):
        _check_shards(shards)
    else:
        _check_feeds(files)
    # merged in the order of the shards, whatever the order of the files
    ordered = sorted(
        (saved for _, saved in files), key=lambda saved: (_residue(saved.provenance.shard), saved.provenance.feeds)
    )
    total = ordered[0]
    for saved in ordered[1:]:
        total = total.merged(saved)
    return replace(total, provenance=replace(total.provenance, shard=None))


def _residue(shard: tuple[int, int] | None) -> int:
    return 0 if shard is None else shard[0] % shard[1]


def _check_alike(files: Sequence[tuple[Path, SavedStatistics]]) -> None:
    first_path, first = files[0]
    for path, saved in files[1:]:
        if saved.provenance.graph_digest != first.provenance.graph_digest:
            raise UsageError(
                f"{path}: it is of another graph than {first_path}",
                "merge statistics that were gathered on one model, for one list of passes",
            )
        if saved.asked != first.asked or saved.provenance.elements != first.provenance.elements:
            raise UsageError(
                f"{path}: it holds other statistics than {first_path}", "gather all parts with the same options"
            )


def _check_shards(shards: Sequence[tuple[Path, tuple[int, int] | None]]) -> None:
    whole = next((path for path, shard in shards if shard is None), None)
    if whole is not None:
        raise UsageError(f"{whole}: it is no part of a calibration, others are", "merge the parts alone")
    counts = {shard[1] for _, shard in shards if shard}
    if len(counts) > 1:
        listed = ", ".join(f"{path} is {shard[0]}/{shard[1]}" for path, shard in shards if shard)
        raise UsageError(f"the files are parts of different divisions: {listed}", "merge the parts of one division")
    count = counts.pop()
    seen: dict[int, Path] = {}
    for path, shard in shards:
        at = _residue(shard)
        if at in seen:
            raise UsageError(f"{path}: it is the same part as {seen[at]}", "give every part once")
        seen[at] = path
    missing = sorted(at or count for at in range(count) if at not in seen)
    if missing:
        raise UsageError(
            f"part {missing[0]}/{count} is missing{_more(len(missing) - 1)}",
            f"gather it with --shard {missing[0]}/{count}; statistics of some of the feeds are not used as if of all",
        )


def _more(count: int) -> str:
    return f", and {count} more" if count > 0 else ""


def _check_feeds(files: Sequence[tuple[Path, SavedStatistics]]) -> None:
    seen: dict[int, Path] = {}
    for path, saved in files:
        feeds = saved.provenance.feeds
        if feeds in seen:
            raise UsageError(f"{path}: it was gathered on the same feeds as {seen[feeds]}", "give every file once")
        seen[feeds] = path


class _Keys:
    """Names of subjects that hold for every model with the same graph, and the way back."""

    def __init__(self, model: Model) -> None:
        self._key: dict[Variable, Key] = {}
        self._variable: dict[Key, Variable] = {}
        self._node: dict[Key, Node] = {}
        for number, body in enumerate(model.bodies()):
            for node in body.nodes:
                if node.outputs:
                    self._node[number, node.outputs[0].name] = node
            owned = [*body.inputs, *(tensor for node in body.nodes for tensor in node.outputs)]
            for variable in owned:
                if not variable.is_empty():
                    self._key[variable] = (number, variable.name)
                    self._variable[number, variable.name] = variable

    def key(self, subject: Any) -> Key:
        if isinstance(subject, tuple):
            axis, *threshold = subject[1:]
            return (*self.key(subject[0]), int(axis), *map(float, threshold))
        if isinstance(subject, Node):
            return self.key(subject.outputs[0])
        return self._key.get(subject, (-1, str(subject.name)))

    def subject(self, kind: str, key: Key) -> Subject:
        number, name, *detail = key
        if kind == "grams":
            return self._node.get((number, name)) or Node("", str(name))
        found = self._variable.get((number, name)) or Variable(str(name))
        return (found, *detail) if detail else found


def _order(key: Key) -> tuple[str, ...]:
    return tuple(map(str, key))


def _stacked(kind: str, tallies: Sequence[Mapping[str, npt.NDArray[Any]]]) -> dict[str, npt.NDArray[Any]]:
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name in tallies[0]:
        parts = [tally[name] for tally in tallies]
        arrays[f"{kind}/{name}"] = np.concatenate([part.reshape(-1) for part in parts])
        arrays[f"{kind}/{name}.shapes"] = np.array([part.shape for part in parts], np.int64).reshape(len(parts), -1)
    return arrays


def _write(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any]) -> None:
    info = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
    # random bits do not shrink, and trying takes longest where there are most of them
    packed = not name.startswith(("grams/", "channel_grams/"))
    info.compress_type = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with archive.open(info, "w", force_zip64=True) as file:
        np.lib.format.write_array(file, np.ascontiguousarray(array) if array.ndim else array, allow_pickle=False)


class _Foreign(Exception):
    """A file that is something else."""


def _read(arrays: Mapping[str, npt.NDArray[Any]]) -> SavedStatistics:
    if "meta" not in arrays:
        raise _Foreign("it holds no statistics")
    meta = json.loads(str(arrays["meta"]))
    if meta["format"] != FORMAT:
        raise _Foreign(f"it has format {meta['format']}, this version reads {FORMAT}")
    shard = meta["shard"]
    if shard is not None and not 0 <= shard[0] <= shard[1] != 0:
        raise ValueError(f"part {shard[0]}/{shard[1]}")
    provenance = Provenance(
        model=str(meta["model"]),
        model_digest=str(meta["model_digest"]),
        graph_digest=str(meta["graph_digest"]),
        graph=str(meta["graph"]),
        elements=None if meta["elements"] is None else int(meta["elements"]),
        feeds=int(meta["feeds"], 16),
        shard=None if shard is None else (int(shard[0]), int(shard[1])),
    )
    asked = {str(kind): [_key(kind, key) for key in keys] for kind, keys in meta["asked"].items()}
    saved = SavedStatistics(provenance, int(meta["samples"]), int(meta["runs"]), asked)
    for kind, keys in meta["measured"].items():
        for key, fields in zip(keys, _unstacked(kind, len(keys), arrays), strict=True):
            if fields.keys() != set(KINDS[kind].names()):
                raise ValueError(f"{kind} holds {', '.join(fields)}")
            tally = KINDS[kind].from_arrays(fields)
            tally.check()
            saved.tallies[kind, _key(kind, key)] = tally
    saved.reasons = {(kind, _key(kind, key)): str(reason) for kind, key, reason in meta["skipped"]}
    return saved


def _key(kind: str, key: Sequence[Any]) -> Key:
    """A key as it was before it became JSON. Raises KeyError or ValueError for what is none."""
    details = _DETAILS.get(kind, 0)
    if kind not in KINDS or len(key) != 2 + details or not isinstance(key[1], str):
        raise ValueError(f"{key} names nothing that {kind} are of")
    return (int(key[0]), key[1], *(int(axis) for axis in key[2:3]), *(float(threshold) for threshold in key[3:]))


def _unstacked(kind: str, count: int, arrays: Mapping[str, npt.NDArray[Any]]) -> Iterable[dict[str, npt.NDArray[Any]]]:
    found: list[dict[str, npt.NDArray[Any]]] = [{} for _ in range(count)]
    prefix = f"{kind}/"
    for name, array in arrays.items():
        if not name.startswith(prefix) or name.endswith(".shapes"):
            continue
        if array.ndim != 1:
            raise ValueError(f"{name} has {array.ndim} axes")
        start = 0
        for fields, shape in zip(found, arrays[f"{name}.shapes"].tolist(), strict=True):
            size = math.prod(shape)
            fields[name.removeprefix(prefix)] = array[start : start + size].reshape(shape).copy()
            start += size
        if start != array.size:
            raise ValueError(f"{name} has {array.size} values, not {start}")
    return found


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
