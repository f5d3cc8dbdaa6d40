"""Small helpers over protobuf messages that keep what this version of onnx does not know."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

M = TypeVar("M", bound=Message)


def copy_without(proto: M, *excluded: str) -> M:
    """A copy of `proto` without the named fields, which are never copied even for a moment.

    Unknown fields survive; only then is the whole message copied and cut.
    """
    copy: Any = type(proto)()
    if len(UnknownFieldSet(proto)):
        copy.CopyFrom(proto)
        for name in excluded:
            copy.ClearField(name)
        return cast(M, copy)
    for field, value in proto.ListFields():
        if field.name in excluded:
            continue
        if field.is_repeated:
            getattr(copy, field.name).extend(value)
        elif field.message_type is not None:
            getattr(copy, field.name).CopyFrom(value)
        else:
            setattr(copy, field.name, value)
    return cast(M, copy)
