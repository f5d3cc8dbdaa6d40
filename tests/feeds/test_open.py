from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper
from PIL import Image

from onnxopt.errors import FeedError, PassError
from onnxopt.feeds import Feeds, Split, open_feeds
from onnxopt.feeds.function import load_function
from onnxopt.runtime import Port
from tests.feeds.ports import IDS, PICTURE, X, indices, row, save_rows


def all_indices(split: Split) -> list[int]:
    return sorted(indices(split.fit) + indices(split.select) + indices(split.evaluate))


def test_one_npz_is_split(tmp_path: Path) -> None:
    split = open_feeds([save_rows(tmp_path / "data.npz", 10)], [X])
    assert all_indices(split) == list(range(10))
    assert (split.note, split.synthetic, split.evaluate_synthetic) == ("", False, False)


def test_several_sources_are_one_run_of_feeds(tmp_path: Path) -> None:
    save_rows(tmp_path / "a.npz", 3)
    (tmp_path / "gen.py").write_text(
        "import numpy as np\ndef f():\n    for i in (3, 4, 5):\n        yield {'x': np.full((1, 3), i, np.float32)}\n"
    )
    split = open_feeds([tmp_path / "a.npz", f"{tmp_path / 'gen.py'}:f"], [X])
    assert all_indices(split) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("nested", [False, True])
def test_a_folder_with_parts_is_split_already(tmp_path: Path, nested: bool) -> None:
    for number, name in enumerate(("fit", "select", "evaluate")):
        if nested:
            (tmp_path / name).mkdir()
            np.savez(tmp_path / name / "a.npz", x=row(number, 0, 0))
        else:
            np.savez(tmp_path / f"{name}.npz", x=row(number, 0, 0))
    split = open_feeds([tmp_path], [X])
    assert (indices(split.fit), indices(split.select), indices(split.evaluate)) == ([0], [1], [2])
    (tmp_path / ("select" if nested else "select.npz")).rename(tmp_path / "away")
    split = open_feeds([tmp_path], [X])
    assert indices(split.select) == [0]
    assert "fit serves select too" in split.note


def parted(folder: Path, first: int, *names: str) -> Path:
    """A folder whose parts hold one feed each, counted from `first`."""
    folder.mkdir()
    for number, name in enumerate(names, start=first):
        np.savez(folder / f"{name}.npz", x=row(number, 0, 0))
    return folder


def test_several_parted_folders_are_merged_part_by_part(tmp_path: Path) -> None:
    one = parted(tmp_path / "one", 0, "fit", "select", "evaluate")
    two = parted(tmp_path / "two", 10, "fit", "evaluate")
    split = open_feeds([one, two], [X])
    assert (indices(split.fit), indices(split.select), indices(split.evaluate)) == ([0, 10], [1], [2, 11])
    assert split.note == ""


def test_a_parted_folder_beside_other_data_is_refused(tmp_path: Path) -> None:
    folder = parted(tmp_path / "one", 0, "fit", "select", "evaluate")
    for other in (save_rows(tmp_path / "data.npz", 4), [{"x": row(1, 0, 0)}]):
        with pytest.raises(FeedError, match=r"one is parted already .* is not"):
            open_feeds([folder, other], [X])
    split = open_feeds([folder / "fit.npz", tmp_path / "data.npz"], [X])
    assert len(all_indices(split)) == 5


@pytest.mark.parametrize(
    ("held", "missing"),
    [(("evaluate",), "fit"), (("fit",), "evaluate"), (("select",), "fit"), (("select", "evaluate"), "fit")],
)
def test_a_folder_that_lacks_a_part_says_which(held: tuple[str, ...], missing: str, tmp_path: Path) -> None:
    folder = parted(tmp_path / "one", 0, *held)
    with pytest.raises(FeedError, match=f"it holds {held[0]}.npz.*, but no {missing} part"):
        open_feeds([folder], [X])
    (folder / f"{held[0]}").mkdir()
    with pytest.raises(FeedError, match=f"both {held[0]}/ and {held[0]}.npz"):
        open_feeds([folder], [X])


def test_evaluation_takes_the_evaluate_part(tmp_path: Path) -> None:
    folder = parted(tmp_path / "one", 0, "fit", "select", "evaluate")
    data = save_rows(tmp_path / "data.npz", 4)
    assert indices(open_feeds([data], [X], evaluate=[folder]).evaluate) == [2]
    only = parted(tmp_path / "only", 7, "evaluate")
    assert indices(open_feeds([folder], [X], evaluate=[only, data]).evaluate) == [7, 0, 1, 2, 3]
    with pytest.raises(FeedError, match="no evaluate part"):
        open_feeds([data], [X], evaluate=[parted(tmp_path / "fit", 0, "fit")])


def test_whole_keeps_nothing_for_calibration(tmp_path: Path) -> None:
    folder, data = parted(tmp_path / "one", 5, "fit", "evaluate"), save_rows(tmp_path / "net.feeds.npz", 4)
    assert indices(open_feeds([data], [X], whole=True).evaluate) == [0, 1, 2, 3]
    assert indices(open_feeds([iter([{"x": row(3, 0, 0)}])], [X], whole=True).evaluate) == [3]
    assert indices(open_feeds([data, folder], [X], whole=True).evaluate) == [0, 1, 2, 3, 6]
    beside = open_feeds([], [X], whole=True, model_path=tmp_path / "net.onnx")
    assert indices(beside.evaluate) == [0, 1, 2, 3]
    assert "net.feeds.npz" in beside.note
    given = open_feeds([], [X], evaluate=[data], whole=True)
    assert (indices(given.evaluate), given.synthetic, given.evaluate_synthetic) == ([0, 1, 2, 3], False, False)
    assert open_feeds([], [X], whole=True).evaluate_synthetic


def test_a_wrong_path_in_a_full_folder_names_no_more_than_one(tmp_path: Path) -> None:
    for number in range(45):
        (tmp_path / f"file_{number}.npz").touch()
    with pytest.raises(FeedError) as caught:
        open_feeds([tmp_path / "quite_another_name"], [X])
    assert caught.value.remedy == "check the path"


def test_evaluation_feeds_are_kept_apart(tmp_path: Path) -> None:
    data = save_rows(tmp_path / "data.npz", 8)
    final = save_rows(tmp_path / "final.npz", 3)
    split = open_feeds([data], [X], evaluate=[final])
    assert (len(split.fit), len(split.select), len(split.evaluate)) == (6, 2, 3)
    assert split.evaluate[0].source == f"{final}[0]"


def test_in_memory_feeds_and_open_feeds(tmp_path: Path) -> None:
    items = [{"x": row(index, 0, 0)} for index in range(5)]
    assert all_indices(open_feeds([items], [X])) == list(range(5))
    assert all_indices(open_feeds([iter(items)], [X])) == list(range(5))
    feeds = open_feeds([items], [X]).fit
    assert isinstance(feeds, Feeds)
    assert all_indices(open_feeds([feeds], [X])) == indices(feeds)
    assert all_indices(open_feeds([feeds, save_rows(tmp_path / "d.npz", 1)], [X])) == sorted([*indices(feeds), 0])


def test_readers_serve_in_memory_and_by_the_name_of_their_class(tmp_path: Path) -> None:
    (tmp_path / "gen.py").write_text(
        "import numpy as np\n"
        "class Reader:\n"
        "    left = 3\n"
        "    def get_next(self):\n"
        "        self.left -= 1\n"
        "        return {'x': np.full((1, 3), self.left, np.float32)} if self.left >= 0 else None\n"
    )
    reader = f"{tmp_path / 'gen.py'}:Reader"
    feeds = open_feeds([reader], [X], whole=True).evaluate
    assert indices(feeds) == [2, 1, 0]
    assert feeds[1].source == f"{reader}[1]"
    given = load_function(tmp_path / "gen.py", "Reader")()
    assert all_indices(open_feeds([given], [X])) == [0, 1, 2]
    with pytest.raises(FeedError, match=r"^Reader: no feed"):
        open_feeds([given], [X])


def test_data_sets_and_pictures_by_folder(tmp_path: Path) -> None:
    sets = tmp_path / "sets"
    (sets / "test_data_set_0").mkdir(parents=True)
    (sets / "test_data_set_0" / "input_0.pb").write_bytes(numpy_helper.from_array(row(5, 0, 0)).SerializeToString())
    assert indices(open_feeds([sets], [X]).fit) == [5]
    assert indices(open_feeds([sets / "test_data_set_0"], [X]).fit) == [5]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a.png", "b.JPG", "c.jpeg"):
        Image.new("RGB", (5, 5), "red").save(pictures / name)
    (pictures / ".DS_Store").write_text("")
    split = open_feeds([pictures], [PICTURE], preprocessing="scale=1")
    assert [len(part) for part in (split.fit, split.select, split.evaluate)] == [1, 1, 1]
    assert split.fit[0].inputs["image"][0, 0, 0, 0] == pytest.approx(255, abs=2)


def test_labels_by_order_and_by_name(tmp_path: Path) -> None:
    data = save_rows(tmp_path / "data.npz", 4)
    np.save(tmp_path / "labels.npy", np.array([10, 11, 12, 13]))
    split = open_feeds([data], [X], labels=tmp_path / "labels.npy")
    for feeds in (split.fit, split.select, split.evaluate):
        for sample in feeds:
            assert sample.labels is not None
            assert sample.labels.tolist() == [10 + int(sample.inputs["x"][0, 0])]
    folder = tmp_path / "folder"
    folder.mkdir()
    np.savez(folder / "a.npz", x=row(1, 0, 0))
    np.savez(folder / "b.npz", x=row(2, 0, 0))
    (tmp_path / "labels.csv").write_text("b.npz,20\na,10\n")
    for sample in open_feeds([folder], [X], evaluate=[folder], evaluate_labels=tmp_path / "labels.csv").evaluate:
        assert sample.labels is not None
        assert sample.labels.tolist() == [10 * int(sample.inputs["x"][0, 0])]


def test_labels_must_cover_the_feeds(tmp_path: Path) -> None:
    data = save_rows(tmp_path / "data.npz", 4)
    np.save(tmp_path / "labels.npy", np.arange(3))
    with pytest.raises(FeedError, match=r"labels\.npy: 3 labels for 4 feeds"):
        open_feeds([data], [X], labels=tmp_path / "labels.npy")
    folder = tmp_path / "folder"
    folder.mkdir()
    np.savez(folder / "a.npz", x=row(1, 0, 0))
    (tmp_path / "labels.csv").write_text("b.npz,20\n")
    with pytest.raises(FeedError, match=r"no label for a\.npz"):
        open_feeds([folder], [X], labels=tmp_path / "labels.csv")
    with pytest.raises(FeedError, match="without feeds"):
        open_feeds([], [X], labels=tmp_path / "labels.npy")
    with pytest.raises(FeedError, match="without feeds for evaluation"):
        open_feeds([data], [X], evaluate_labels=tmp_path / "labels.npy")


def test_the_first_sample_is_checked_at_once_and_the_others_when_read(tmp_path: Path) -> None:
    for part in ("fit", "evaluate"):
        (tmp_path / part).mkdir()
        np.savez(tmp_path / part / "a.npz", x=row(1, 2, 3))
    np.savez(tmp_path / "fit" / "b.npz", x=row(1, 2, 3, 4))
    split = open_feeds([tmp_path], [X])
    with pytest.raises(FeedError, match=r"b\.npz: input 'x': expected 3"):
        list(split.fit)
    np.savez(tmp_path / "wrong.npz", y=np.zeros((4, 3), np.float32))
    with pytest.raises(FeedError, match=r"wrong\.npz\[\d\]: the model has no input 'y'"):
        open_feeds([tmp_path / "wrong.npz"], [X])


def test_paths_that_hold_no_feeds_are_named(tmp_path: Path) -> None:
    (tmp_path / "calibration").mkdir()
    with pytest.raises(FeedError, match="no such file or folder") as caught:
        open_feeds([tmp_path / "calibratoin"], [X])
    assert "calibration" in caught.value.remedy
    with pytest.raises(FeedError, match=r"calibration: the folder holds no feed"):
        open_feeds([tmp_path / "calibration"], [X])
    (tmp_path / "feeds.py").write_text("")
    with pytest.raises(FeedError, match=r"feeds\.py: feeds can't be read") as caught:
        open_feeds([tmp_path / "feeds.py"], [X])
    assert "feeds.py:feeds" in caught.value.remedy
    with pytest.raises(FeedError, match="no feed"):
        open_feeds([[]], [X])
    (tmp_path / "calibration" / "a.png").write_bytes(b"")
    save_rows(tmp_path / "calibration" / "b.npz", 1)
    with pytest.raises(FeedError, match=r"it holds \.npz files and pictures"):
        open_feeds([tmp_path / "calibration"], [X])


def test_a_feed_whose_link_leads_nowhere_is_not_left_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=row(0))
    (tmp_path / "b.npz").symlink_to("gone.npz")
    with pytest.raises(FeedError, match=r"b\.npz: the link leads nowhere"):
        open_feeds([tmp_path], [X])


def test_a_function_without_feeds_is_told_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def feeds():\n    return []\n")
    with pytest.raises(FeedError, match=r"f\.py:feeds: no feed") as caught:
        open_feeds([f"{tmp_path / 'f.py'}:feeds"], [X])
    assert caught.value.remedy == "give at least one dict of arrays"


def test_without_data_feeds_beside_the_model_serve(tmp_path: Path) -> None:
    model = tmp_path / "net.onnx"
    sets = tmp_path / "test_data_set_0"
    sets.mkdir()
    (sets / "input_0.pb").write_bytes(numpy_helper.from_array(row(5, 0, 0)).SerializeToString())
    split = open_feeds([], [X], model_path=model)
    assert indices(split.fit) == [5]
    assert "data sets beside" in split.note
    assert "one feed serves" in split.note
    save_rows(tmp_path / "net.feeds.npz", 5)
    split = open_feeds([], [X], model_path=model)
    assert all_indices(split) == list(range(5))
    assert "net.feeds.npz" in split.note
    assert not split.synthetic


def test_without_any_data_inputs_are_made_up_loudly(tmp_path: Path) -> None:
    split = open_feeds([], [X, IDS], model_path=tmp_path / "net.onnx")
    assert split.synthetic
    assert split.evaluate_synthetic
    assert "SYNTHETIC" in split.note
    assert set(split.fit[0].inputs) == {"x", "ids"}
    real = open_feeds([], [X], evaluate=[save_rows(tmp_path / "final.npz", 2)])
    assert (real.synthetic, real.evaluate_synthetic) == (True, False)


def test_made_up_inputs_are_tried_on_the_model() -> None:
    def run(inputs: Any) -> None:
        if inputs["ids"].shape != (1, 32):
            raise PassError("too short", "feed more")

    split = open_feeds([], [X, IDS], probe=run)
    assert split.evaluate[0].inputs["ids"].shape == (1, 32)


def test_open_feeds_of_another_model_are_checked_again() -> None:
    feeds = open_feeds([[{"x": row(1, 2, 3)}]], [X]).fit
    with pytest.raises(FeedError, match="expected float64"):
        open_feeds([feeds], [Port("x", np.dtype(np.float64), ("N", 3))])


def test_data_sets_of_another_model_are_passed_over_not_silently(tmp_path: Path) -> None:
    sets = tmp_path / "test_data_set_0"
    sets.mkdir()
    (sets / "input_0.pb").write_bytes(numpy_helper.from_array(np.zeros((1, 9), np.float32)).SerializeToString())
    split = open_feeds([], [X], model_path=tmp_path / "net.onnx")
    assert split.synthetic
    assert "don't fit it" in split.note
