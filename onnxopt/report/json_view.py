"""Report <-> JSON.

Field names are the dataclasses' own. JSON has no infinities, so they are written as the strings "inf", "-inf", "nan".
Within one schema_version fields are only added; readers skip those they don't know.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import types
import typing
from typing import Any

from onnxopt.errors import UsageError
from onnxopt.report.record import SCHEMA_VERSION, Report


def dump(report: Report) -> str:
    """The report as indented JSON that ends with a newline."""
    return text_of(report)


def text_of(record: Any) -> str:
    """Dataclasses, and lists and mappings of them, as indented JSON that ends with a newline."""
    return json.dumps(_encode(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def fields_of(record: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON has them, to which more may be added."""
    return typing.cast(dict[str, Any], _encode(record))


def load(text: str) -> Report:
    """The report in a JSON text. Raises UsageError when it is none, or of a schema this version can't read."""
    try:
        data = json.loads(text)
        version = data["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError("the text is no onnxopt report", "give a file written with --report FILE.json") from error
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"the report has schema version {version!r}, this onnxopt reads {SCHEMA_VERSION!r}",
            "read it with the onnxopt that wrote it",
        )
    try:
        return typing.cast(Report, _decode(Report, data))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the report is damaged: {error}", "write it again with --report FILE.json") from error


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {item.name: _encode(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _decode(wanted: Any, data: Any) -> Any:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        if data is None:
            return None
        return _decode(next(kind for kind in arguments if kind is not type(None)), data)
    if origin is tuple:
        return tuple(_decode(arguments[0], item) for item in data)
    if origin is dict:
        return {key: _decode(arguments[1], item) for key, item in data.items()}
    if dataclasses.is_dataclass(wanted):
        hints = typing.get_type_hints(wanted)
        known = {item.name for item in dataclasses.fields(wanted)}
        return typing.cast(Any, wanted)(
            **{key: _decode(hints[key], item) for key, item in data.items() if key in known}
        )
    if wanted is float or (isinstance(wanted, type) and issubclass(wanted, enum.Enum)):
        return wanted(data)
    if not isinstance(data, wanted):
        raise TypeError(f"expected {wanted.__name__}, found {data!r}")
    return data
