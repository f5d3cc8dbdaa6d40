"""A model from a path or a proto, its limits held, and every way that can fail in plain words."""

from __future__ import annotations

from pathlib import Path

from google.protobuf.message import DecodeError
from onnx import ModelProto

from onnxopt.errors import LimitError, ModelError, UsageError
from onnxopt.model import files
from onnxopt.model.limits import Limits, LimitsLike, check_limits, no_text, too_deep
from onnxopt.model.model import Model

# protobuf refuses messages of this many bytes
_MESSAGE = 1 << 31


def load(source: str | Path | ModelProto | Model, limits: LimitsLike = "default") -> Model:
    """Load a model from a path, or take over a ModelProto (which is not changed).

    limits: "default", "strict", "off" or `onnxopt.model.Limits`. Raises UsageError for a missing path, ModelError for a
    file that is no valid or no safe ONNX model, LimitError for one that asks for more than `limits` allow.
    """
    bounds = Limits.of(limits)
    if isinstance(source, Model):
        return source
    path = None if isinstance(source, ModelProto) else Path(source)
    try:
        proto = source if isinstance(source, ModelProto) else _read(Path(source))
        check_limits(proto, bounds)
        return Model.from_proto(proto, path)
    except DecodeError as error:  # of a proto in memory that protobuf itself could not read back
        raise too_deep("the model") from error
    except UnicodeDecodeError as error:
        raise no_text(f"{path or 'the model'}: a text in it") from error
    except OSError as error:
        raise ModelError(
            f"{path}: its external data can't be read: {error.strerror}",
            "put the file that holds it beside the model, readable",
        ) from error
    except (LimitError, ModelError) as error:
        if path is None or str(path) in error.cause:
            raise
        raise type(error)(f"{path}: {error.cause}", error.remedy) from error


def _read(path: Path) -> ModelProto:
    """Parse a model file. Raises UsageError for a missing path or a device, ModelError for what is no ONNX model."""
    if path.exists() and not path.is_dir() and not path.is_file():
        raise UsageError(f"{path} is no regular file", "give the path of the .onnx file")
    if path.is_file() and path.stat().st_size >= _MESSAGE:
        raise ModelError(
            f"{path} has {path.stat().st_size:,} bytes; protobuf reads less than 2 GiB",
            "export the model with its weights as external data",
        )
    try:
        return files.read_proto(path)
    except ModelError as error:
        if "MaxDepth" in str(error.__cause__):
            raise too_deep(str(path)) from error
        raise
