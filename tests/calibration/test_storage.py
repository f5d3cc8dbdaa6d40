"""Files of statistics: what goes in comes out, and nothing but what was written is taken for one."""

from __future__ import annotations

import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxopt.calibration import Requests, Statistics, collect
from onnxopt.calibration.storage import FORMAT, Provenance, SavedStatistics, merge
from onnxopt.calibration.tallies import KINDS
from onnxopt.errors import UsageError
from onnxopt.feeds import Sample
from onnxopt.model import Model, Variable, load
from tests.calibration.truth import everything, same, tensor, tensors
from tests.helpers import model, proto, with_weights

TEXT = """g (float[n, 3] x, bool c) => (float[n, 2] y, float[n, 3] z) {
  a = Relu(x)  l = Log(x)  y = MatMul(a, w)
  z = If (c) < then_branch = t () => (float[n, 3] o) { b = Neg(x)  o = Abs(b) },
               else_branch = e () => (float[n, 3] o) { b = Add(x, x)  o = Abs(b) }> }"""
ORIGIN = Provenance("m.onnx", "ab", "cd", "the model as it is", 8192, 12345)


def example() -> tuple[Model, Requests]:
    the_model = load(with_weights(proto(TEXT), w=np.arange(6, dtype=np.float32).reshape(3, 2)))
    inner = tuple(t for body in the_model.bodies() if body.parent for node in body.nodes for t in node.outputs)
    wanted = tensors(the_model, "x a y")
    gram = next(node for node in the_model.graph.nodes if node.op == "MatMul")
    channels = Requests(channel_grams=tuple((each, axis) for each in wanted for axis in (1, -1)))
    requests = everything(wanted, (1, -1), 0.1, [gram]) | channels
    return the_model, requests | Requests((*inner, tensor(the_model, "l")), moments=tensors(the_model, "l"))


def samples(count: int = 8) -> list[Sample]:
    """Whole numbers, whose sums are exact."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-9, 9, (1 + at % 3, 3)).astype(np.float32) for at in range(count)]
    arrays[0][0, 0] = -1
    return [Sample({"x": a, "c": np.array(at % 2 == 0)}, None, f"sample {at}") for at, a in enumerate(arrays)]


def gathered(**changes: Any) -> tuple[Model, Requests, Statistics, SavedStatistics]:
    the_model, requests = example()
    found = collect(the_model, requests, samples())
    return the_model, requests, found, SavedStatistics.of(the_model, requests, found, replace(ORIGIN, **changes))


@pytest.fixture(scope="module")
def content() -> bytes:
    """A good file."""
    return gathered()[3].to_bytes()


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    the_model, requests, found, saved = gathered()
    assert {kind for kind, _, _ in found.tallies()} == set(KINDS)
    assert found.skipped == [("l", "holds NaN (sample 0)")]
    saved.save(tmp_path / "s.npz")
    read = SavedStatistics.load(tmp_path / "s.npz")
    assert read.provenance == saved.provenance
    assert (read.samples, read.runs, read.asked) == (saved.samples, saved.runs, saved.asked)
    assert read.lacks(the_model, requests) == []
    same(found, read.bind(the_model), sums=0)
    assert found.runs == read.bind(the_model).runs
    again, _ = example()  # the same graph, loaded anew
    bound = read.bind(again)
    for name in "xay":
        mine, theirs = tensor(the_model, name), tensor(again, name)
        assert found.range(mine) == bound.range(theirs)
        assert found.mean_extremes(mine) == bound.mean_extremes(theirs)
        assert np.array_equal(np.asarray(found.channel_mean(mine, -1)), np.asarray(bound.channel_mean(theirs, -1)))
        assert np.array_equal(np.asarray(found.firing(mine, 1, 0.1)), np.asarray(bound.firing(theirs, 1, 0.1)))
    assert bound.reason(tensor(again, "l"), "moments") == "holds NaN (sample 0)"
    assert read.to_bytes() == saved.to_bytes()


def test_tensors_of_one_name_in_sibling_bodies_keep_apart(tmp_path: Path) -> None:
    the_model, _, found, saved = gathered()
    saved.save(tmp_path / "s.npz")
    bound = SavedStatistics.load(tmp_path / "s.npz").bind(the_model)
    both = [t for body in the_model.bodies() for node in body.nodes for t in node.outputs if t.name == "b"]
    assert len(both) == 2
    assert found.range(both[0]) != found.range(both[1])
    assert [bound.range(variable) for variable in both] == [found.range(variable) for variable in both]


def test_equal_figures_are_equal_bytes(content: bytes) -> None:
    the_model, requests = example()
    for seed in range(4):
        shuffled = random.Random(seed).sample(samples()[1:], 7)  # sample 0 is the first that holds NaN
        found = collect(the_model, requests, [samples()[0], *shuffled], memory=1 + 10**9 * (seed % 2))
        saved = SavedStatistics.of(the_model, requests, found, ORIGIN)
        assert saved.to_bytes() == content
    order = Requests(**{kind: tuple(reversed(wanted)) for kind, wanted in requests.by_kind().items()})
    found = collect(the_model, order, samples())
    assert SavedStatistics.of(the_model, order, found, ORIGIN).to_bytes() == content


def test_parts_merged_are_the_whole_byte_for_byte(content: bytes, tmp_path: Path) -> None:
    the_model, requests = example()
    paths = []
    for part in range(3):
        found = collect(the_model, requests, samples()[part::3])
        paths.append(tmp_path / f"{part}.npz")
        origin = replace(ORIGIN, feeds=4115, shard=(part or 3, 3))
        SavedStatistics.of(the_model, requests, found, origin).save(paths[-1])
    merged = merge(random.Random(0).sample(paths, 3))
    assert merged.provenance == ORIGIN
    assert merged.to_bytes() == content


def test_merging_changes_none_of_the_parts() -> None:
    the_model, requests, _, saved = gathered()
    other = SavedStatistics.of(the_model, requests, collect(the_model, requests, samples(5)), ORIGIN)
    before = saved.to_bytes(), other.to_bytes()
    total = saved.merged(other).merged(saved).merged(other)
    assert (saved.to_bytes(), other.to_bytes()) == before
    assert total.samples == 26
    whole = saved.bind(the_model)
    whole.merge(other.bind(the_model))
    whole.merge(other.bind(the_model))
    assert (saved.to_bytes(), other.to_bytes()) == before


def test_parts_with_other_channels_are_skipped_as_samples_would_be() -> None:
    the_model = model("g (float[n, c] x) => (float[n, c] y) { y = Neg(x) }")
    y = tensor(the_model, "y")
    requests = everything((y,), (1,)) | Requests(channel_grams=((y, 1),))
    each = [Sample({"x": np.ones((2, n), np.float32)}, None, str(n)) for n in (3, 5)]
    whole = collect(the_model, requests, each)
    parts = [collect(the_model, requests, [sample]) for sample in each]
    saved = [SavedStatistics.of(the_model, requests, part, ORIGIN) for part in parts]
    same(whole, saved[0].merged(saved[1]).bind(the_model))
    same(whole, saved[1].merged(saved[0]).bind(the_model))
    parts[0].merge(parts[1])
    same(whole, parts[0])


def test_what_was_not_asked_for_is_lacking() -> None:
    the_model, _, _, saved = gathered()
    x, y = tensors(the_model, "x y")
    assert saved.lacks(the_model, Requests((x,), channel_means=((y, 1),))) == []
    assert saved.lacks(the_model, Requests((x, tensor(the_model, "z")), channel_means=((y, 0),))) == [
        "ranges",
        "channel_means",
    ]
    assert saved.lacks(the_model, Requests(firings=((x, 1, 0.2),))) == ["firings"]
    assert saved.lacks(the_model, Requests((Variable("stranger"),))) == ["ranges"]


def test_subjects_that_are_gone_bind_to_nothing() -> None:
    _, _, _, saved = gathered()
    other = model("g (float[n, 3] x) => (float[n, 3] y) { y = Neg(x) }")
    bound = saved.bind(other)
    assert bound.range(tensor(other, "x")) is not None
    assert saved.samples == bound.samples


# damage


def rewritten(content: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """The file with other arrays; change(arrays, meta) edits both."""
    with np.load(io.BytesIO(content)) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(str(arrays["meta"]))
    change(arrays, meta)
    if "meta" in arrays and str(arrays["meta"]).startswith("{"):
        arrays["meta"] = np.array(json.dumps(meta))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def refused(path: Path, raw: bytes, words: str = ".") -> None:
    path.write_bytes(raw)
    with pytest.raises(UsageError, match=words) as caught:
        SavedStatistics.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError):
        merge([path, path])


def test_a_rewritten_file_is_read(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.npz").write_bytes(rewritten(content, lambda arrays, meta: None))
    assert SavedStatistics.load(tmp_path / "s.npz").to_bytes() == content


def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    npy, npz, empty = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(npy, np.ones(3))
    np.savez(npz, x=np.ones(3))
    zipfile.ZipFile(empty, "w").close()
    objects = io.BytesIO()
    np.savez(objects, meta=np.array({"format": 1}, object), allow_pickle=True)
    foreign = [b"", b"\0", b"PK\x03\x04", b"no archive", npy.getvalue(), npz.getvalue(), empty.getvalue()]
    foreign += [pickle.dumps({"a": 1}), objects.getvalue(), content + b"x" * 70_000, b"\x93NUMPY"]
    for raw in foreign:
        refused(path, raw, "it holds no statistics|truncated|zip")


def test_a_file_cut_off_anywhere_is_refused(content: bytes, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for size in [*range(40), *rng.integers(0, len(content) - 1, 60).tolist(), len(content) - 1]:
        refused(tmp_path / "s.npz", content[:size])


def test_flipped_bytes_are_refused_or_change_nothing(content: bytes, tmp_path: Path) -> None:
    """Archive members have checksums; some bytes of the archive's directory mean nothing."""
    path = tmp_path / "s.npz"
    rng = np.random.default_rng(0)
    noticed = 0
    for at in rng.integers(0, len(content), 300).tolist():
        raw = bytearray(content)
        raw[at] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(raw))
        try:
            assert SavedStatistics.load(path).to_bytes() == content
        except UsageError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017
            noticed += 1
    assert noticed > 150


MEMBERS = ["ranges/minimum", "histograms/counts", "grams/matrix", "firings/fired", "moments/count"]


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize(
    "damage",
    [
        lambda a: a[:-1],
        lambda a: np.concatenate([a, a[:1]]),
        lambda a: a.astype(np.float32),
        lambda a: a.astype(np.complex128),
        lambda a: a.astype(np.str_),
        lambda a: a.astype(np.bool_),
        lambda a: a.reshape(1, -1),
        lambda a: a.astype(a.dtype.newbyteorder()),
        lambda a: np.full_like(a, -1) if a.dtype.kind == "i" else np.full_like(a, np.nan),
        lambda a: a.astype(np.float64) if a.dtype.kind == "i" else np.full_like(a, np.inf),
        lambda a: np.array(3),
    ],
)
def test_damaged_arrays_are_refused(content: bytes, tmp_path: Path, member: str, damage: Callable[[Any], Any]) -> None:
    def change(arrays: dict[str, Any], _: dict[str, Any]) -> None:
        assert member in arrays
        arrays[member] = damage(arrays[member])

    refused(tmp_path / "s.npz", rewritten(content, change), "it holds no statistics")


def _drop(name: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda arrays, meta: arrays.pop(name)


def _set(name: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda arrays, meta: meta.__setitem__(name, value)


def _array(name: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda arrays, meta: arrays.__setitem__(name, value)


DAMAGE: list[tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = [
    (_drop("meta"), "it holds no statistics"),
    (_drop("ranges/minimum"), "no statistics"),
    (_drop("ranges/magnitudes_low"), "no statistics"),
    (_drop("histograms/counts"), "no statistics"),
    (_drop("grams/total.shapes"), "no statistics"),
    (_array("ranges/minimum.shapes", np.ones((6, 0))), "no statistics"),
    (_array("channel_means/total.shapes", np.full((6, 1), -1)), "no statistics"),
    (_array("grams/matrix.shapes", np.array([[1, 9, 1]])), "no statistics"),
    (_array("histograms/exponent", np.array([200, 0, 0])), "no statistics"),
    (_array("ranges/more", np.ones(7)), "no statistics"),
    (_array("meta", np.array("no JSON")), "no statistics"),
    (_array("meta", np.array("[1]")), "no statistics"),
    (_array("meta", np.array("[" * 100_000)), "no statistics"),
    (_array("meta", np.ones(3)), "no statistics"),
    (_set("format", FORMAT + 1), f"it has format {FORMAT + 1}, this version reads {FORMAT}"),
    (_set("format", None), "it has format None"),
    (_set("samples", "many"), "no statistics"),
    (_set("feeds", 7), "no statistics"),
    (_set("feeds", "xyz"), "no statistics"),
    (_set("shard", 3), "no statistics"),
    (_set("shard", [1]), "no statistics"),
    (_set("shard", [0, 0]), "no statistics"),
    (_set("shard", [4, 3]), "no statistics"),
    (_set("shard", [-1, 3]), "no statistics"),
    (_set("asked", []), "no statistics"),
    (_set("asked", {"ranges": [3]}), "no statistics"),
    (_set("asked", {"ranges": [[0, "x", 1]]}), "no statistics"),
    (_set("asked", {"nonsense": [[0, "x"]]}), "no statistics"),
    (_set("measured", {"ranges": [[0, "x"]]}), "no statistics"),
    (_set("measured", {"nonsense": [[0, "x"]]}), "no statistics"),
    (_set("measured", None), "no statistics"),
    (_set("skipped", [["ranges", [0, "x"]]]), "no statistics"),
    (_set("skipped", [["ranges", "x", "because"]]), "no statistics"),
]


@pytest.mark.parametrize("at", range(len(DAMAGE)))
def test_damaged_descriptions_are_refused(content: bytes, tmp_path: Path, at: int) -> None:
    change, words = DAMAGE[at]
    refused(tmp_path / "s.npz", rewritten(content, change), words)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(UsageError, match="no such file"):
            SavedStatistics.load(path)
    with pytest.raises(UsageError):
        gathered()[3].save(tmp_path / "none" / "s.npz")


# merging


def written(folder: Path, *changes: dict[str, Any]) -> list[Path]:
    the_model, requests, found, _ = gathered()
    paths = []
    for at, change in enumerate(changes):
        paths.append(folder / f"{at}.npz")
        asked = Requests(requests.ranges) if change.pop("less", False) else requests
        SavedStatistics.of(the_model, asked, found, replace(ORIGIN, **change)).save(paths[-1])
    return paths


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([{}, {"feeds": 1, "graph_digest": "other"}], "1.npz: it is of another graph than .*0.npz"),
        ([{}, {"feeds": 1, "elements": None}], "1.npz: it holds other statistics than .*0.npz"),
        ([{}, {"feeds": 1, "less": True}], "1.npz: it holds other statistics than .*0.npz"),
        ([{}, {"feeds": 1}, {}], "2.npz: it was gathered on the same feeds as .*0.npz"),
        ([{"shard": (1, 2)}, {}], "1.npz: it is no part of a calibration, others are"),
        ([{"shard": (1, 2)}, {"shard": (1, 3)}], "different divisions: .*0.npz is 1/2, .*1.npz is 1/3"),
        ([{"shard": (1, 2)}, {"shard": (1, 2)}], "1.npz: it is the same part as .*0.npz"),
        ([{"shard": (2, 2)}, {"shard": (1, 2)}, {"shard": (0, 2)}], "2.npz: it is the same part as .*0.npz"),
        ([{"shard": (1, 2)}], "part 2/2 is missing"),
        ([{"shard": (2, 4)}], "part 1/4 is missing, and 2 more"),
        ([], "there is nothing to merge"),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path: Path, changes: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        merge(written(tmp_path, *changes))


def test_a_part_named_twice_is_refused(tmp_path: Path) -> None:
    one, other = written(tmp_path, {"shard": (1, 2)}, {"shard": (2, 2)})
    with pytest.raises(UsageError, match="it is the same part as"):
        merge([one, other, one])
    assert merge([one, other]).samples == 16
    with pytest.raises(UsageError, match="the same feeds"):
        merge(written(tmp_path, {}) * 2)


def test_whole_files_over_other_feeds_add_up(tmp_path: Path) -> None:
    paths = written(tmp_path, {}, {"feeds": 2**128 - 1}, {"feeds": 5})
    total = merge(paths)
    assert total.samples == 24
    assert total.provenance.feeds == 12345 - 1 + 5
    assert merge(paths[:1]).to_bytes() == paths[0].read_bytes()
