"""Feeds in ONNX's own layout: folders test_data_set_0, ... with input_0.pb, ... in the order of the model's inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnxopt.errors import FeedError
from onnxopt.feeds.sample import Record
from onnxopt.runtime.ports import Port

_FOLDER = re.compile(r"test_data_set_(\d+)")
_INPUT = re.compile(r"input_(\d+)\.pb")


def data_sets(folder: Path) -> list[Path]:
    """The data sets in a folder, in order of their numbers; the folder itself when it holds input_*.pb files."""
    if any(_INPUT.fullmatch(path.name) for path in folder.iterdir()):
        return [folder]
    found = [(_FOLDER.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return [path for _, path in sorted((int(match.group(1)), path) for match, path in found if match)]


class DataSets:
    """One feed a data set folder."""

    def __init__(self, folders: Sequence[Path], ports: Sequence[Port]) -> None:
        self._folders = tuple(folders)
        self._ports = tuple(ports)

    def __len__(self) -> int:
        return len(self._folders)

    def name(self, index: int) -> str:
        """The folder at `index`."""
        return str(self._folders[index])

    def read(self, index: int) -> Record:
        """The feed in the folder at `index`."""
        folder = self._folders[index]
        found = [(_INPUT.fullmatch(path.name), path) for path in folder.iterdir()]
        values = {}
        for number, path in sorted((int(match.group(1)), path) for match, path in found if match):
            if number >= len(self._ports):
                raise FeedError(
                    f"{path}: the model has only {len(self._ports)} inputs",
                    "use the data set that belongs to the model",
                )
            values[self._ports[number].name] = _read(path, self._ports[number].kind)
        if not values:
            raise FeedError(f"{folder}: it holds no input_*.pb file", "point to a complete data set")
        return Record(values, self.name(index))


def _read(path: Path, kind: str) -> Any:
    try:
        content = path.read_bytes()
        if kind == "sequence":
            return numpy_helper.to_list(onnx.SequenceProto.FromString(content))
        if kind == "optional":
            return numpy_helper.to_optional(onnx.OptionalProto.FromString(content))
        tensor = onnx.TensorProto.FromString(content)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ValueError("its values lie in another file")
        array = numpy_helper.to_array(tensor)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise FeedError(
            f"{path}: it can't be read as a {kind}: {why}",
            "write it with onnx.numpy_helper.from_array(array).SerializeToString()",
        ) from error
    if array.dtype.kind == "O":
        decoded = [item.decode("utf-8", "surrogateescape") if isinstance(item, bytes) else item for item in array.flat]
        return np.array(decoded, object).reshape(array.shape)
    return array
