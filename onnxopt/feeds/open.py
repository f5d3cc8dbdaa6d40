"""From what the user names to feeds in three parts."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from onnxopt.errors import FeedError
from onnxopt.feeds import arrays, hugging_face, images, parquet, polygraphy, test_data
from onnxopt.feeds.function import call_function, from_items, split_reference
from onnxopt.feeds.images import Images
from onnxopt.feeds.parted import part_by_part, to_judge
from onnxopt.feeds.places import SUFFIXES
from onnxopt.feeds.sample import Chain, Feeds, Labelled, Source
from onnxopt.feeds.split import Split, split_feeds
from onnxopt.feeds.synthetic import runnable_feeds, synthetic_feeds
from onnxopt.runtime.ports import Array, Port


class Reader(Protocol):
    """What gives one feed a call and None at the end, as onnxruntime's CalibrationDataReader does."""

    def get_next(self) -> Any:
        """Input name -> array, or None."""


# A path, "file.py:function", a sequence or iterable of mappings, a reader, a datasets.Dataset, or open feeds.
Data: TypeAlias = str | Path | Feeds | Iterable[Mapping[str, Any]] | Reader
_FORMS = (
    "give .npz or .parquet files, Polygraphy's .json, a folder of one of these, an ONNX test_data_set folder, "
    "a folder of pictures, a data set saved by Hugging Face's datasets, or file.py:function"
)


def open_feeds(
    data: Sequence[Data],
    model_inputs: Sequence[Port],
    *,
    evaluate: Sequence[Data] = (),
    labels: Path | str | None = None,
    evaluate_labels: Path | str | None = None,
    model_path: Path | None = None,
    preprocessing: Images | str | None = None,
    seed: int = 0,
    whole: bool = False,
    reject_nan: bool = False,
    probe: Callable[[Mapping[str, Any]], object] | None = None,
) -> Split:
    """The feeds of all `data` in three parts (see split_feeds), held against the model's inputs.

    evaluate: feeds kept for the final comparison. labels, evaluate_labels: a file with one label a feed. preprocessing:
    what is done to pictures. whole: nothing is kept for calibration, all feeds serve every part. Without `data`:
    `<model>.feeds.npz` or test_data_set_* beside model_path, failing that synthetic inputs, which the note says.
    Folders with fit and evaluate (and select) parts are split already and put together part by part; of such a folder
    in `evaluate`, or with `whole`, the evaluate part is taken.
    probe: runs the model on inputs (Session.run); then synthetic inputs get sizes that the model accepts.

    Raises FeedError, naming file and tensor, for feeds that can't be read or don't fit; the first sample of every part
    is read at once, the others when used. Raises UsageError for wrong preprocessing.
    """
    opener = _Opener(tuple(model_inputs), _images(preprocessing), reject_nan)
    final = opener.open(to_judge(evaluate), evaluate_labels) if evaluate else None
    if not evaluate and evaluate_labels is not None:
        raise FeedError("labels for evaluation are given without feeds for evaluation", "give the feeds with --eval")
    if whole and data and final is None:
        final = opener.open(to_judge(data), labels)
    if whole and final is not None:
        split = Split(final, final, final)
    elif not data:
        split = _without_data(opener, model_path, labels, seed, final, whole, probe)
    elif parts := part_by_part(data):
        split = _open_parts(opener, parts, labels, final)
    else:
        split = split_feeds(opener.open(data, labels), seed=seed, evaluate=final)
    for feeds in (split.fit, split.select, split.evaluate):
        feeds[0]
    return split


class _Opener:
    """Finds the source for each thing the user may name."""

    def __init__(self, ports: tuple[Port, ...], preprocessing: Images | None, reject_nan: bool) -> None:
        self.ports = ports
        self._preprocessing = preprocessing
        self._reject_nan = reject_nan

    def open(self, data: Sequence[Data], labels: Path | str | None = None) -> Feeds:
        """All of the data as one run of feeds."""
        if len(data) == 1 and isinstance(data[0], Feeds):
            return data[0].for_inputs(self.ports)
        sources = [self.source(item) for item in data]
        source = sources[0] if len(sources) == 1 else Chain(sources)
        if len(source) == 0:
            shown = (str(item) if isinstance(item, (str, Path)) else type(item).__name__ for item in data)
            files = any(isinstance(item, (str, Path)) and split_reference(str(item)) is None for item in data)
            raise FeedError(f"{', '.join(shown)}: no feed", _FORMS if files else "give at least one dict of arrays")
        return self.feeds(source, labels)

    def feeds(self, source: Source, labels: Path | str | None = None) -> Feeds:
        """A source as feeds of the model, with labels from a file."""
        if labels is not None:
            source = Labelled(source, _labels(Path(labels), source))
        return Feeds(source, self.ports, reject_nan=self._reject_nan)

    def source(self, item: Data) -> Source:
        """The source for one path, reference or thing in memory."""
        if isinstance(item, Feeds):
            return from_items([_flat(sample) for sample in item], "feeds")
        if not isinstance(item, (str, Path)):
            return self._memory(item, "feeds")
        reference = split_reference(str(item))
        if reference is not None:
            return self._memory(call_function(*reference), str(item))
        if str(item) == "":
            raise FeedError("an empty path names no feeds", "check the variable that should hold it")
        path = Path(item)
        if path.is_dir():
            return self._folder(path)
        if not path.is_file():
            raise _missing(path)
        return self._file(path)

    def _memory(self, items: Any, name: str) -> Source:
        if hugging_face.is_dataset(items, name):
            return hugging_face.DatasetRows(items, name, self.ports, self._preprocessing)
        return from_items(items, name)

    def _file(self, path: Path) -> Source:
        suffix = path.suffix.lower()
        if path.suffix in arrays.SUFFIXES:
            return arrays.ArrayFile(path, self.ports)
        if suffix in images.SUFFIXES:
            return images.ImageFolder([path], self.ports, self._preprocessing)
        if suffix == parquet.SUFFIX:
            return parquet.ParquetFiles([path], self.ports, self._preprocessing)
        if suffix == polygraphy.SUFFIX:
            return polygraphy.PolygraphyFiles([path])
        hint = f"name a function: {path}:feeds" if suffix == ".py" else _FORMS
        raise FeedError(f"{path}: feeds can't be read from it", hint)

    def _folder(self, path: Path) -> Source:
        if hugging_face.is_saved(path):
            dataset = hugging_face.load_saved(path)
            return hugging_face.DatasetRows(dataset, str(path), self.ports, self._preprocessing)
        names = [file for file in path.iterdir() if not file.name.startswith(".")]
        files = [file for file in names if file.is_file()]
        lost = next((file for file in sorted(names) if file.suffix.lower() in SUFFIXES and not file.exists()), None)
        if lost is not None:
            raise FeedError(f"{lost}: the link leads nowhere", "repair or remove it")
        numpy_files = [file for file in files if file.suffix in arrays.SUFFIXES]
        pictures = [file for file in files if file.suffix.lower() in images.SUFFIXES]
        tables = [file for file in files if file.suffix.lower() == parquet.SUFFIX]
        sets = test_data.data_sets(path)
        found = {".npz files": numpy_files, "pictures": pictures, ".parquet files": tables, "data sets": sets}
        kinds = [name for name, members in found.items() if members]
        if len(kinds) > 1:
            raise FeedError(
                f"{path}: it holds {' and '.join(kinds)}", "put each kind of feeds into a folder of its own"
            )
        if numpy_files:
            return arrays.ArrayFolder(numpy_files, self.ports)
        if sets:
            return test_data.DataSets(sets, self.ports)
        if pictures:
            return images.ImageFolder(pictures, self.ports, self._preprocessing)
        if tables:
            return parquet.ParquetFiles(tables, self.ports, self._preprocessing)
        # Beside other feeds a .json file may say anything about them; alone it is feeds.
        texts = [file for file in files if file.suffix.lower() == polygraphy.SUFFIX]
        if texts:
            return polygraphy.PolygraphyFiles(texts)
        raise FeedError(f"{path}: the folder holds no feed", _FORMS)


def _flat(sample: Any) -> dict[str, Any]:
    return {**sample.inputs, **({} if sample.labels is None else {"labels": sample.labels})}


def _images(preprocessing: Images | str | None) -> Images | None:
    return Images.parse(preprocessing) if isinstance(preprocessing, str) else preprocessing


def _missing(path: Path) -> FeedError:
    folder = path.parent
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return FeedError(f"{path}: no such file or folder", f"did you mean {close[0]!r}?" if close else "check the path")


def _labels(path: Path, source: Source) -> list[Array]:
    """One array a feed, with a first axis of length 1."""
    found = arrays.read_labels(path)
    if not isinstance(found, dict):
        if found.ndim == 0 or len(found) != len(source):
            count = len(found) if found.ndim else 1
            raise FeedError(f"{path}: {count} labels for {len(source)} feeds", "give one label a feed, in feed order")
        return [found[index : index + 1] for index in range(len(found))]
    names = [Path(source.name(index)) for index in range(len(source))]
    by_name = {**{Path(name).stem: label for name, label in found.items()}, **found}
    unknown = next((name for name in names if name.name not in by_name and name.stem not in by_name), None)
    if unknown is not None:
        raise FeedError(f"{path}: no label for {unknown.name}", "give a line for every feed: file name, label")
    return [by_name[name.name if name.name in by_name else name.stem][None] for name in names]


def _open_parts(
    opener: _Opener, parts: Mapping[str, Sequence[Path]], labels: Path | str | None, final: Feeds | None
) -> Split:
    if labels is not None:
        folder = parts["fit"][0].parent
        raise FeedError(f"{folder}: a folder with parts takes no separate labels", "put 'labels' into the .npz files")
    found = {name: opener.open(paths) for name, paths in parts.items() if paths}
    note = "" if "select" in found else "fit serves select too"
    judge = found["evaluate"] if final is None else final
    return Split(found["fit"], found.get("select", found["fit"]), judge, note)


def _without_data(
    opener: _Opener,
    model_path: Path | None,
    labels: Path | str | None,
    seed: int,
    final: Feeds | None,
    whole: bool,
    probe: Callable[[Mapping[str, Any]], object] | None,
) -> Split:
    def divided(feeds: Feeds) -> Split:
        return Split(feeds, feeds, feeds) if whole else split_feeds(feeds, seed=seed, evaluate=final)

    problem = ""
    if model_path is not None:
        beside = model_path.with_name(f"{model_path.stem}.feeds.npz")
        if beside.is_file():
            return _noted(divided(opener.open([beside], labels)), f"feeds of {beside}")
        feeds, problem = _data_sets_beside(opener, model_path.parent, labels)
        if feeds is not None:
            return _noted(divided(feeds), f"feeds of the data sets beside {model_path}")
    if labels is not None:
        raise FeedError(f"{labels}: labels are given without feeds", "give the feeds with --data")
    ports = opener.ports
    made_up = synthetic_feeds(ports, seed=seed) if probe is None else runnable_feeds(ports, probe, seed=seed)
    note = f"no data given: inputs are SYNTHETIC, made up from the model's signature{problem}"
    return replace(_noted(divided(made_up), note), synthetic=True, evaluate_synthetic=final is None)


def _data_sets_beside(opener: _Opener, folder: Path, labels: Path | str | None) -> tuple[Feeds | None, str]:
    """The feeds of the data sets in the model's folder, if they fit, and what to say when they don't.

    They may belong to another model of the folder, so they are passed over then, but not silently.
    """
    sets = test_data.data_sets(folder) if folder.is_dir() else []
    if not sets:
        return None, ""
    feeds = opener.feeds(test_data.DataSets(sets, opener.ports), labels)
    try:
        feeds[0]
    except FeedError as error:
        return None, f"; the data sets beside the model don't fit it ({error.cause})"
    return feeds, ""


def _noted(split: Split, note: str) -> Split:
    return replace(split, note="; ".join(filter(None, (note, split.note))))
