from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxopt.errors import FeedError, UsageError
from onnxopt.feeds.images import ImageFolder, Images, Preprocessing
from onnxopt.runtime import Port
from tests.feeds.ports import IDS, PICTURE, X


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """4 x 6 pixels, each channel a constant: red 255, green 51, blue 0; the left half of red is 0."""
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, 3:, 0] = 255
    pixels[..., 1] = 51
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    return path


def read(path: Path, port: Port, text: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    values: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = (
        ImageFolder([path], [port], Images.parse(text)).read(0).values[port.name]
    )
    return values


def test_parse_reads_every_key() -> None:
    text = "size=224x192,mean=0.485,0.456,0.406,std=0.229+0.224+0.225,layout=nhwc,scale=1,channels=bgr,resize=crop"
    expected = Images((224, 192), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "nhwc", 1.0, "bgr", "crop")
    assert Images.parse(text) == expected
    assert Images.parse("size=32").size == (32, 32)
    assert Images.parse("mean=-1+0+2").mean == (-1, 0, 2)
    assert Images.parse("") == Images()


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("sise=3", "unknown key 'sise'"),
        ("layout=chw", "layout='chw'"),
        ("size=0x3", "size='0x3'"),
        ("size=1x2x3", "size='1x2x3'"),
        ("mean=grey", "mean='grey'"),
        ("std=0", "std='0'"),
        ("224", "'224' has no key"),
        ("scale=1+2", r"scale='1\+2'"),
    ],
)
def test_parse_refuses_what_it_does_not_know(text: str, cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        Images.parse(text)


def test_values_are_scaled_shifted_and_laid_out(picture: Path) -> None:
    values = read(picture, PICTURE, "mean=0.2+0+0,std=0.5+1+2")
    assert values.shape == (1, 3, 4, 6)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values[0, 0, 0], [-0.4] * 3 + [1.6] * 3, rtol=1e-6)
    np.testing.assert_allclose(values[0, 1], 0.2, rtol=1e-6)
    np.testing.assert_array_equal(values[0, 2], 0)


def test_nhwc_is_told_by_the_model_and_bgr_by_the_user(picture: Path) -> None:
    port = Port("image", np.dtype(np.float16), (1, 4, 6, 3))
    values = read(picture, port, "channels=bgr,scale=1")
    assert values.dtype == np.float16
    assert values[0, 0, 5].tolist() == [0, 51, 255]


def test_uint8_inputs_get_the_pixels(picture: Path) -> None:
    port = Port("image", np.dtype(np.uint8), (1, 3, 4, 6))
    assert read(picture, port, "")[0, :, 0, 5].tolist() == [255, 51, 0]
    with pytest.raises(FeedError, match="pixels as they are"):
        read(picture, port, "mean=0.5")


def test_crop_keeps_the_aspect_and_stretch_does_not(picture: Path) -> None:
    port = Port("image", np.dtype(np.float32), (1, 3, None, None))
    crop = read(picture, port, "size=4x2,resize=crop,scale=1")[0, 0]
    stretch = read(picture, port, "size=4x2,scale=1")[0, 0]
    np.testing.assert_array_equal(crop, [[0, 255]] * 4)
    assert 0 < stretch[0, 0] < stretch[0, 1] < 255


def test_gray_has_one_channel(picture: Path) -> None:
    port = Port("image", np.dtype(np.float32), (1, 1, 4, 6))
    assert read(picture, port, "channels=gray").shape == (1, 1, 4, 6)


@pytest.mark.parametrize(
    ("ports", "text", "cause"),
    [
        ([X], "", "one input of rank 4"),
        ([PICTURE, IDS], "", "one input of rank 4"),
        ([Port("i", np.dtype(np.float32), (1, None, 4, 6))], "", "where its channels are"),
        ([Port("i", np.dtype(np.float32), (1, 3, "H", "W"))], "", "height and width"),
        ([Port("i", np.dtype(np.int64), (1, 3, 4, 6))], "", "can't feed an input of int64"),
        ([PICTURE], "mean=1+2", "mean has 2 numbers for 3 channels"),
    ],
)
def test_what_the_model_leaves_open_must_be_stated(picture: Path, ports: list[Port], text: str, cause: str) -> None:
    with pytest.raises(FeedError, match=cause):
        ImageFolder([picture], ports, Images.parse(text))


@pytest.mark.parametrize("text", ["mean=0.2+0+0,std=0.5+1+2", "size=2x2,resize=crop,channels=bgr"])
def test_paths_bytes_and_open_pictures_give_the_same(picture: Path, text: str) -> None:
    preprocessing = Preprocessing([PICTURE], Images.parse(text))
    expected = read(picture, PICTURE, text)
    np.testing.assert_array_equal(preprocessing.array(picture.read_bytes(), "row"), expected)
    with Image.open(picture) as opened:
        for _ in range(2):
            np.testing.assert_array_equal(preprocessing.array(opened, "row"), expected)


def test_bytes_that_are_no_picture_are_named_without_an_address() -> None:
    with pytest.raises(FeedError) as caught:
        Preprocessing([PICTURE], None).array(b"no picture", "t.parquet[3]: column 'image'")
    assert (
        caught.value.cause == "t.parquet[3]: column 'image': it can't be read as a picture: cannot identify image file"
    )


def test_broken_pictures_are_named(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(FeedError, match=r"b\.png: it can't be read as a picture"):
        ImageFolder([tmp_path / "b.png"], [PICTURE], None).read(0)


def test_without_pillow_the_remedy_is_the_extra(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(FeedError) as caught:
        ImageFolder([picture], [PICTURE], None).read(0)
    assert caught.value.remedy == "pip install onnxopt[images]"


@pytest.mark.parametrize(
    ("channels", "spec", "remedy"),
    [(1, "size=4x6,layout=nchw", "channels=gray"), (3, "channels=gray", "channels=rgb"), (4, "layout=nchw", "file.py")],
)
def test_other_numbers_of_channels_name_the_setting(channels: int, spec: str, remedy: str, tmp_path: Path) -> None:
    port = Port("image", np.dtype(np.float32), ("N", channels, 4, 6))
    with pytest.raises(FeedError, match="channels, the pictures are read with") as caught:
        ImageFolder([tmp_path / "a.png"], [port], Images.parse(spec))
    assert remedy in caught.value.remedy
