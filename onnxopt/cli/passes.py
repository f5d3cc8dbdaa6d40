"""`onnxopt passes`: what there is, and what each takes."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any, get_type_hints

from onnxopt.passbase import lookup, names, pass_list, pass_lists

_WIDTH = 80


def overview() -> str:
    """One line a pass: its name and its help."""
    known, lists = names(), pass_lists()
    width = max(map(len, known), default=0)
    lines = [_folded(f"{name:<{width}}  ", _help(name)) for name in known]
    if lists:
        lines += ["", *(_folded(f"{name:<{width}}  ", _members(name)) for name in lists)]
    return "\n".join([*lines, "", "onnxopt passes NAME shows the options of one."])


def _members(name: str) -> str:
    return f"a list of passes: {', '.join(dict.fromkeys(pass_list(name) or ()))}"


def _help(name: str) -> str:
    """The pass's line; where its package is broken, what the matter is, so that the others are listed all the same."""
    try:
        return lookup(name).help()
    except Exception as error:  # noqa: BLE001  a third party's module may raise anything
        return f"can't be loaded: {type(error).__name__}: {error}"


def describe(name: str) -> str:
    """Help, effect, preparation and options of one pass. Raises UsageError for an unknown one."""
    if pass_list(name) is not None:
        use = f"--passes {name} or --passes {name}:skip=PASS+PASS"
        return "\n".join([_folded("", _members(name)), "", f"use       {use}"])
    pass_ = lookup(name)
    lines = [_folded("", pass_.help()), ""]
    lines.append(f"effect    {pass_().effect.value}, without options")
    if pass_.prepare:
        lines.append(f"prepared  by {', '.join(pass_.prepare)}, inserted before it")
    options = pass_.options()
    lines.append(f"use       --passes {name}" + (f" or --passes {name}:{options[0].name}=..." if options else ""))
    if options:
        lines += ["", "options"]
    hints = get_type_hints(pass_)
    width = max((len(item.name) for item in options), default=0)
    for item in options:
        lines.append(_folded(f"  {item.name:<{width}}  ", f"{item.metadata.get('help', '')} [{_values(item, hints)}]"))
    return "\n".join(lines)


def _folded(lead: str, text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead))


def _values(item: dataclasses.Field[Any], hints: dict[str, Any]) -> str:
    """What an option takes, and its default: "0.0 to 0.95, default 0.0"."""
    low, high, choices = (item.metadata.get(key) for key in ("minimum", "maximum", "choices"))
    if choices:
        takes = " | ".join(choices)
    elif low is not None or high is not None:
        takes = f"from {low}" if high is None else f"up to {high}" if low is None else f"{low} to {high}"
    else:
        takes = _kind(hints[item.name])
    return f"{takes}, default {_shown(item.default) or 'none'}"


def _kind(hint: Any) -> str:
    known = {bool: "true | false", int: "a whole number", float: "a number", str: "text"}
    if hint in known:
        return known[hint]
    if getattr(hint, "__origin__", None) is tuple:
        return "a list joined by +"
    arguments = [part for part in getattr(hint, "__args__", ()) if part is not type(None)]
    return " or ".join(_kind(part) for part in arguments) or str(hint)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else str(value)
