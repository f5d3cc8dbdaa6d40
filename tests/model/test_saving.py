"""Saving: one file or two, equal bytes each time, and nothing broken when it is cut off at any moment."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto

from onnxopt.errors import LimitError, ModelError, UsageError
from onnxopt.model import Model, load, saving
from tests.helpers import assert_equal, proto, random_feeds, run, with_weights

OURS = re.compile(r"model\.[0-9a-f]{16}\.onnxdata")


def source(value: float = 1.0) -> ModelProto:
    """y = (x + w) * w + v, v too small for a sidecar."""
    text = "g (float[2,256] x) => (float[2,256] y) { s = Add(x, w) t = Mul(s, u) y = Add(t, v) }"
    large = np.full((2, 256), value, np.float32)
    return with_weights(proto(text), w=large, u=large + 1, v=np.ones(1, np.float32))


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def sidecar(folder: Path) -> Path:
    (found,) = (entry for entry in folder.iterdir() if OURS.fullmatch(entry.name))
    return found


def test_always_puts_large_values_beside_the_model(tmp_path: Path) -> None:
    expected = source()
    path = load(expected).save(tmp_path / "model.onnx", external_data="always")
    assert names(tmp_path) == [sidecar(tmp_path).name, "model.onnx"]
    assert sidecar(tmp_path).stat().st_size == 4096 + 2048
    inside = {tensor.name: tensor for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    assert [name for name in inside if inside[name].data_location == TensorProto.EXTERNAL] == ["w", "u"]
    assert [entry.value for entry in inside["u"].external_data] == [sidecar(tmp_path).name, "4096", "2048"]
    assert load(path).to_proto() == expected
    feeds = random_feeds(expected)
    assert_equal(run(expected, feeds), run(onnx.load(path), feeds))


def test_a_content_is_stored_once(tmp_path: Path) -> None:
    target = load(source())
    target.graph.nodes[1].inputs[1].values = target.graph.nodes[0].inputs[1].data
    target.save(tmp_path / "model.onnx", external_data="always")
    assert sidecar(tmp_path).stat().st_size == 2048


def test_auto_and_never_keep_a_small_model_whole(tmp_path: Path) -> None:
    expected = source()
    for place in ("auto", "never"):
        load(expected).save(tmp_path / "model.onnx", external_data=place)
        assert names(tmp_path) == ["model.onnx"]
        assert onnx.load(tmp_path / "model.onnx") == expected


def test_an_unknown_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sometimes"):
        load(source()).save(tmp_path / "model.onnx", external_data="sometimes")


def test_values_in_bodies_and_constant_nodes_go_to_the_sidecar(tmp_path: Path) -> None:
    text = """g (bool c, float[512] x) => (float[512] y) {
        y = If(c) <then_branch = t () => (float[512] p) { p = Mul(x, w) },
                   else_branch = e () => (float[512] q) { k = Identity(w) q = Add(x, k) }>
    }"""
    expected = proto(text)
    branches = [attribute.g for attribute in expected.graph.node[0].attribute]
    weights = onnx.numpy_helper.from_array(np.arange(512, dtype=np.float32), "w")
    branches[0].initializer.append(weights)
    constant = onnx.helper.make_node("Constant", [], ["w"], value=weights)
    branches[1].node.insert(0, constant)
    path = load(expected).save(tmp_path / "model.onnx", external_data="always")
    assert sidecar(tmp_path).stat().st_size >= 2048
    assert path.stat().st_size < 2048
    assert load(path).to_proto() == expected
    for choice in (True, False):
        feeds = {"c": np.array(choice), "x": np.ones(512, np.float32)}
        assert_equal(run(expected, feeds), run(onnx.load(path), feeds))


def test_a_model_without_large_values_gets_no_sidecar(tmp_path: Path) -> None:
    expected = proto("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    load(expected).save(tmp_path / "model.onnx", external_data="always")
    assert names(tmp_path) == ["model.onnx"]
    assert onnx.load(tmp_path / "model.onnx") == expected


@pytest.mark.parametrize("place", ["always", "never"])
def test_equal_models_make_equal_bytes_wherever_they_are_saved(tmp_path: Path, place: str) -> None:
    found = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        load(source()).save(folder / "model.onnx", external_data=place)
        load(source()).save(folder / "model.onnx", external_data=place)
        found.append({entry.name: entry.read_bytes() for entry in folder.iterdir()})
        time.sleep(0.01)
    assert found[0] == found[1]
    assert len(found[0]) == (2 if place == "always" else 1)


def huge(folder: Path, gigabytes: int) -> Model:
    """A model whose weight is a hole of a file beside it."""
    elements = gigabytes << 28
    with (folder / "weights.bin").open("wb") as file:
        file.truncate(4 * elements)
    model = proto(f"g (float[{elements}] x) => (float[{elements}] y) {{ y = Add(x, w) }}")
    tensor = model.graph.initializer.add(name="w", dims=[elements], data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    path = folder / "huge.onnx"
    path.write_bytes(model.SerializeToString())
    return load(path)


def test_more_than_one_file_takes_is_refused_with_the_way_out(tmp_path: Path) -> None:
    target = huge(tmp_path, 3)
    (tmp_path / "model.onnx").write_bytes(b"old")
    before = names(tmp_path)
    started = time.perf_counter()
    with pytest.raises(LimitError, match=r"3\.2 GB") as caught:
        target.save(tmp_path / "model.onnx", external_data="never")
    assert time.perf_counter() - started < 1
    assert "--external-data auto" in caught.value.remedy
    assert (names(tmp_path), (tmp_path / "model.onnx").read_bytes()) == (before, b"old")


def test_auto_changes_over_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = load(source())
    for limit, files in ((target.nbytes(), 1), (target.nbytes() - 1, 2)):
        monkeypatch.setattr("onnxopt.model.files.INLINE_LIMIT", limit)
        target.save(tmp_path / "model.onnx")
        assert len(names(tmp_path)) == files


# what happens to an old sidecar


def test_the_sidecar_of_the_replaced_model_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    load(source(1)).save(path, external_data="always")
    old = sidecar(tmp_path)
    load(source(2)).save(path, external_data="always")
    assert not old.exists()
    assert names(tmp_path) == [sidecar(tmp_path).name, "model.onnx"]
    assert load(path).to_proto() == source(2)
    load(source(3)).save(path, external_data="never")
    assert names(tmp_path) == ["model.onnx"]


def test_a_model_may_be_saved_over_itself(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    load(source()).save(path, external_data="always")
    target = load(path)
    target.graph.nodes[2].inputs[1].values = np.full(1, 7, np.float32)
    target.save(path, external_data="always")
    target.graph.nodes[0].inputs[1].values = np.zeros((2, 256), np.float32)
    target.save(path, external_data="always")  # u is read from a sidecar that is deleted already
    target.save(path, external_data="never")
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    assert (found["v"][0], found["w"][0, 0], found["u"][0, 0]) == (7, 0, 2)
    assert names(tmp_path) == ["model.onnx"]


def test_other_files_of_the_replaced_model_stay(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    other = tmp_path / f"model.{'0' * 16}.onnxdata"  # our kind of name, but the model does not refer to it
    other.write_bytes(b"kept")
    onnx.save(source(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    foreign = tmp_path / "another.0123456789abcdef.onnxdata"
    foreign.write_bytes(b"kept")
    load(source(2)).save(path, external_data="always")
    assert {"weights.bin", other.name, foreign.name} < set(names(tmp_path))


def test_a_sidecar_of_another_stem_stays(tmp_path: Path) -> None:
    load(source()).save(tmp_path / "first.onnx", external_data="always")
    (tmp_path / "model.onnx").write_bytes((tmp_path / "first.onnx").read_bytes())
    load(source(2)).save(tmp_path / "model.onnx", external_data="always")
    assert load(tmp_path / "first.onnx").to_proto() == source()


def test_what_is_replaced_need_not_be_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\xff no model")
    (tmp_path / f"model.{'a' * 16}.onnxdata").touch()
    load(source()).save(path, external_data="always")
    assert load(path).to_proto() == source()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_refused_save_leaves_the_old_model_and_its_sidecar(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "model.onnx"
    load(source(1)).save(path, external_data="always")
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}

    def refuse(written: Path) -> None:
        assert load(written).to_proto() == source(2)
        raise error

    for _ in range(2):
        with pytest.raises(error):
            load(source(2)).save(path, refuse, external_data="always")
        assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_a_refused_save_of_the_same_content_leaves_its_sidecar(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    load(source()).save(path, external_data="always")

    def refuse(_written: Path) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        load(source()).save(path, refuse, external_data="always")
    assert load(path).to_proto() == source()


def test_an_interrupt_after_the_last_renaming_leaves_the_new_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    real = saving._flush_folder

    def interrupt(folder: Path) -> None:
        real(folder)
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(saving, "_flush_folder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(source()).save(path, external_data="always")
    assert load(path).to_proto() == source()


def test_a_source_that_became_shorter_leaves_the_old_model(tmp_path: Path) -> None:
    target = huge(tmp_path, 3)
    (tmp_path / "model.onnx").write_bytes(b"old")
    with (tmp_path / "weights.bin").open("r+b") as file:
        file.truncate(100)
    before = names(tmp_path)
    with pytest.raises(ModelError, match="became shorter"):
        target.save(tmp_path / "model.onnx", external_data="always")
    assert (names(tmp_path), (tmp_path / "model.onnx").read_bytes()) == (before, b"old")


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_self: object, _chunk: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.Sidecar, "_append", full)
    with pytest.raises(UsageError, match="No space left") as caught:
        load(source()).save(tmp_path / "model.onnx", external_data="always")
    assert "free space" in caught.value.remedy
    assert names(tmp_path) == []


# kill -9

SAVER = """
import sys
import numpy as np
from onnxopt.model import load
path, place, size, version = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = load(path)
print('ready', flush=True)
while True:
    version += 1
    model.graph.nodes[0].inputs[1].values = np.full(size, version % 7, np.float32)
    model.save(path, external_data=place)
    print('saved', flush=True)
"""
_SIZE = 7_500_000


def kill_while_saving(folder: Path, place: str, kills: int) -> None:
    """Let a child save 30 MB versions over one path and kill it at random moments; the path must always hold one."""
    text = f"g (float[1] x) => (float[{_SIZE}] y) {{ y = Add(x, w) }}"
    path = folder / "model.onnx"
    load(with_weights(proto(text), w=np.zeros(_SIZE, np.float32))).save(path, external_data=place)
    root = str(Path(__file__).resolve().parents[2])
    chance = random.Random(0)
    versions = set()
    for kill in range(kills):
        command = [sys.executable, "-c", SAVER, str(path), place, str(_SIZE), str(3 * kill)]
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            if kill % 3 == 0:
                assert child.stdout.readline() == b"saved\n"
            time.sleep(chance.uniform(0, 0.4))
            child.kill()
        values = load(path).graph.initializers[0].values
        assert values.shape == (_SIZE,)
        assert values.min() == values.max()
        assert values[0] in range(7)
        versions.add(float(values[0]))
        for left in folder.glob(".*.tmp"):
            left.unlink()
    assert versions != {0.0}


@pytest.mark.parametrize("place", ["always", "never"])
def test_a_kill_at_any_moment_leaves_a_whole_model(tmp_path: Path, place: str) -> None:
    kill_while_saving(tmp_path, place, 6)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["always", "never"])
def test_a_hundred_kills_leave_a_whole_model(tmp_path: Path, place: str) -> None:
    kill_while_saving(tmp_path, place, 100)
