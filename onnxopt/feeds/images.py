"""Feeds from photographs, with the preprocessing stated and nothing guessed that the model's input doesn't say."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxopt.errors import FeedError, UsageError, did_you_mean
from onnxopt.feeds.sample import Record
from onnxopt.runtime.ports import Array, Port, dtype_name, is_float

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
_CHOICES = {"layout": ("nchw", "nhwc"), "channels": ("rgb", "bgr", "gray"), "resize": ("stretch", "crop")}
_KEYS = ("size", "mean", "std", "layout", "scale", "channels", "resize")
_EXAMPLE = "for example size=224x224,mean=0.485+0.456+0.406,std=0.229+0.224+0.225,layout=nchw,scale=255,channels=rgb"


@dataclass(frozen=True)
class Images:
    """How a picture becomes an input: (pixel / scale - mean) / std, in the given layout and channel order.

    size: (height, width), default the model's own. mean, std: one number a channel in the order of `channels`, or one
    for all, in units of pixel / scale. layout: nchw or nhwc, default by where the model has its axis of 1 or 3. scale:
    what pixels of 0..255 are divided by. resize: "stretch" to size, or "crop": cover size, then cut out the middle.
    A uint8 input gets the pixels themselves; mean, std and scale are refused then.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str | None = None
    scale: float = 255.0
    channels: str = "rgb"
    resize: str = "stretch"

    @classmethod
    def parse(cls, text: str) -> Images:
        """Read "size=224x224,mean=0.5,std=0.5,layout=nchw,scale=255,channels=rgb,resize=crop"; all parts are optional.

        Lists are joined by "+" or ",". Raises UsageError for an unknown key or a value that doesn't fit it.
        """
        values: dict[str, str] = {}
        key = ""
        for word in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = word.partition("=")
            if equals:
                key = name.strip()
                if key not in _KEYS:
                    raise UsageError(f"image preprocessing: unknown key {key!r}", did_you_mean(key, _KEYS))
                values[key] = value.strip()
            elif key in ("mean", "std"):
                values[key] += f"+{word}"
            else:
                raise UsageError(f"image preprocessing: {word!r} has no key", _EXAMPLE)
        return cls(**{key: _parse_value(key, value) for key, value in values.items()})


def _parse_value(key: str, value: str) -> Any:
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            raise UsageError(f"image preprocessing: {key}={value!r}", f"use one of {', '.join(_CHOICES[key])}")
        return value
    try:
        if key == "size":
            sides = [int(side) for side in value.lower().split("x")]
            height, width = sides if len(sides) == 2 else (*sides, *sides)
            if min(height, width) < 1:
                raise ValueError
            return height, width
        numbers = tuple(float(number) for number in value.split("+"))
        if key == "mean":
            return numbers
        if 0.0 in numbers or (key == "scale" and len(numbers) != 1):
            raise ValueError
        return numbers[0] if key == "scale" else numbers
    except ValueError:
        raise UsageError(f"image preprocessing: {key}={value!r} can't be read", _EXAMPLE) from None


class Preprocessing:
    """Pictures as values of the only input, of rank 4, of a model. Raises FeedError where it and `images` don't fit."""

    def __init__(self, ports: Sequence[Port], images: Images | None) -> None:
        self._images = images or Images()
        self.port = _image_port(ports)
        self._layout, self._size = _geometry(self.port, self._images)
        _check_channels(self.port, self._images, self._layout)
        _check_config(self.port, self._images)

    def array(self, picture: Any, source: str) -> Array:
        """A picture as an array of shape [1,C,H,W] or [1,H,W,C].

        picture: the path or the bytes of a file, or a PIL.Image.Image. Raises FeedError naming `source`.
        """
        pixels = _decoded(picture, source, self._images, self._size)
        dtype = self.port.dtype or np.dtype(np.float32)
        if dtype == np.uint8:
            values = pixels
        else:
            scaled = pixels.astype(np.float32) / np.float32(self._images.scale)
            normal = (scaled - np.array(self._images.mean, np.float32)) / np.array(self._images.std, np.float32)
            values = normal.astype(dtype)
        if self._layout == "nchw":
            values = values.transpose(2, 0, 1)
        return np.ascontiguousarray(values[None])


class ImageFolder:
    """One picture a feed, sorted by name, for models with one input of rank 4."""

    def __init__(self, files: Sequence[Path], ports: Sequence[Port], images: Images | None) -> None:
        self._files = sorted(files)
        self._preprocessing = Preprocessing(ports, images)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """The path of the picture at `index`."""
        return str(self._files[index])

    def read(self, index: int) -> Record:
        """The picture at `index` as the model's input."""
        source = self.name(index)
        value = self._preprocessing.array(self._files[index], source)
        return Record({self._preprocessing.port.name: value}, source)


def takes_pictures(ports: Sequence[Port]) -> bool:
    """True for a model whose only required input has rank 4."""
    required = [port for port in ports if port.required]
    return len(required) == 1 and len(required[0].shape or ()) == 4


def _image_port(ports: Sequence[Port]) -> Port:
    required = [port for port in ports if port.required]
    if not takes_pictures(ports):
        listed = ", ".join(map(str, required)) or "none"
        raise FeedError(
            f"pictures serve models with one input of rank 4; the inputs of this one are {listed}",
            "save the inputs with np.savez, or yield them from file.py:function",
        )
    return required[0]


def _geometry(port: Port, images: Images) -> tuple[str, tuple[int, int]]:
    """(layout, (height, width)) from the configuration, else from the model's input."""
    shape = port.shape or ()
    guess = "nchw" if shape[1] in (1, 3) else "nhwc" if shape[3] in (1, 3) else None
    layout = images.layout or guess
    if layout is None:
        raise FeedError(
            f"input {port} doesn't say where its channels are", "add layout=nchw or layout=nhwc to --images"
        )
    height, width = shape[2:4] if layout == "nchw" else shape[1:3]
    if images.size is not None:
        return layout, images.size
    if isinstance(height, int) and isinstance(width, int):
        return layout, (height, width)
    raise FeedError(f"input {port} doesn't say its height and width", "add size=HEIGHTxWIDTH to --images")


def _check_channels(port: Port, images: Images, layout: str) -> None:
    """Raise FeedError where the model's input has another number of channels than the pictures get."""
    shape = port.shape or ()
    wanted = shape[1] if layout == "nchw" else shape[3]
    count = 1 if images.channels == "gray" else 3
    if not isinstance(wanted, int) or wanted == count:
        return
    known = {1: "add channels=gray to --images", 3: "use channels=rgb or channels=bgr in --images"}
    raise FeedError(
        f"input {port} has {wanted} channels, the pictures are read with {count}",
        known.get(wanted, "yield the inputs from file.py:function"),
    )


def _check_config(port: Port, images: Images) -> None:
    count = 1 if images.channels == "gray" else 3
    for name, numbers in (("mean", images.mean), ("std", images.std)):
        if len(numbers) not in (1, count):
            raise FeedError(f"{name} has {len(numbers)} numbers for {count} channels", f"give one or {count}")
    dtype = port.dtype
    if dtype is None or is_float(dtype):
        return
    if dtype != np.uint8:
        raise FeedError(
            f"pictures can't feed an input of {dtype_name(dtype)}", "yield the inputs from file.py:function"
        )
    if images.mean != (0.0,) or images.std != (1.0,) or images.scale != 255.0:
        raise FeedError(f"input {port} takes the pixels as they are", "leave out mean, std and scale")


def _decoded(picture: Any, source: str, images: Images, size: tuple[int, int]) -> Array:
    """uint8 pixels of shape [height, width, channels] of a path, the bytes of a file, or a PIL.Image.Image."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise FeedError(f"{source}: pictures need Pillow", "pip install onnxopt[images]") from None
    height, width = size
    mode = "L" if images.channels == "gray" else "RGB"
    try:
        with _opened(Image, picture) as file:
            decoded = file.convert(mode)
    except Exception as error:
        # Pillow names the file, which for bytes is an address in memory.
        why = str(error).partition(" <_io.")[0]
        raise FeedError(f"{source}: it can't be read as a picture: {why}", "remove or replace it") from error
    bilinear = Image.Resampling.BILINEAR
    crop = images.resize == "crop"
    fitted = ImageOps.fit(decoded, (width, height), bilinear) if crop else decoded.resize((width, height), bilinear)
    pixels: Array = np.asarray(fitted, np.uint8).reshape(height, width, -1)
    return pixels[..., ::-1] if images.channels == "bgr" else pixels


def _opened(pillow: Any, picture: Any) -> Any:
    """A context manager that gives the picture; one that is open already belongs to the caller and stays open."""
    if isinstance(picture, pillow.Image):
        return nullcontext(picture)
    return pillow.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
