"""The text of a pass list, there and back.

prune:ratio=0.3:round_to=8,int8            passes apart by commas, options after colons
'prune{ratio=0.3,round_to=8},int8'         the same in braces; quote it, the shell would expand them
int8:exclude=/head/conv+/tail/conv         the items of a list value are joined by +
./my_pass.py:MyPass:threshold=0.1          a pass of your own
int8:exclude="a:0"                         quotes keep commas, colons and braces in a value
simplify:skip=recompose+dedup              a name that stands for several passes, and those to be left out of them
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from onnxopt.errors import OnnxoptError, UsageError, did_you_mean
from onnxopt.passbase import Pass, lookup, names, pass_list, pass_lists

PassLike = str | Pass | type[Pass]

_FILE = re.compile(r"(?P<name>.+?\.py:[^:{=]+)(?P<rest>[:{].*)?", re.DOTALL)
_NEEDS_QUOTES = re.compile(r"""[,:{}"'\s]""")


@dataclass(frozen=True)
class Step:
    """One place of a pipeline: a configured pass, the name it was asked for by, and which pass it prepares, if any."""

    pass_: Pass
    source: str
    inserted_for: str | None = None

    def __str__(self) -> str:
        parts = [self.source]
        for item in dataclasses.fields(self.pass_):
            value = getattr(self.pass_, item.name)
            if value != item.default:
                parts.append(f"{item.name}={_quoted(_text(value))}")
        return ":".join(parts)


def parse(passes: PassLike | Sequence[PassLike]) -> list[Step]:
    """The steps of a pass list: a text, a configured pass, a pass class, or a sequence of these.

    Raises UsageError for a text that doesn't parse, an option that doesn't fit, and unknown passes: all in one error.
    """
    items = [passes] if isinstance(passes, (str, Pass, type)) else list(passes)
    written = [entry for item in items for entry in (_entries(item) if isinstance(item, str) else [item])]
    if not written:
        raise UsageError("the pass list is empty", "name at least one pass, such as: --passes prune,int8")
    found = _lookup_all(entry[0] for entry in written if isinstance(entry, tuple))
    steps = []
    for entry in written:
        if isinstance(entry, tuple):
            name, settings = entry
            steps.append(Step(found[name].parse(settings), name))
        else:
            configured = entry() if isinstance(entry, type) else entry
            steps.append(Step(configured, configured.name))
    return steps


def canonical(steps: Iterable[Step]) -> str:
    """The steps as text that parses back to the same; passes that the pipeline inserted are left out."""
    return ",".join(str(step) for step in steps if step.inserted_for is None)


def _lookup_all(wanted: Iterable[str]) -> dict[str, type[Pass]]:
    found: dict[str, type[Pass]] = {}
    unknown: list[str] = []
    for name in dict.fromkeys(wanted):
        try:
            found[name] = lookup(name)
        except UsageError:
            if ".py:" in name or name in names():
                raise
            unknown.append(name)
    if not unknown:
        return found
    known = [*names(), *pass_lists()]
    if len(unknown) == 1:
        raise UsageError(f"unknown pass {unknown[0]!r}", did_you_mean(unknown[0], known))
    hints = dict.fromkeys(did_you_mean(name, known) for name in unknown)
    raise UsageError(f"unknown passes {', '.join(map(repr, unknown))}", "; ".join(hints))


def _entries(text: str) -> list[tuple[str, dict[str, str]]]:
    entries: list[tuple[str, dict[str, str]]] = []
    for part in _split(text, ","):
        part = part.strip()
        if not part:
            if entries or "," in text:
                raise UsageError(f"an empty place in the pass list {text!r}", "take out the comma that is too much")
            continue
        entries += _expanded(*_entry(part, entries[-1][0] if entries else "NAME"))
    return entries


def _expanded(name: str, settings: dict[str, str]) -> list[tuple[str, dict[str, str]]]:
    """The entries that a name stands for: the passes of a list, or itself."""
    listed = pass_list(name)
    if listed is None:
        return [(name, settings)]
    entries = [entry for text in listed for entry in _entries(text)]
    known = list(dict.fromkeys(each for each, _ in entries))
    skipped = [word for word in settings.get("skip", "").split("+") if word]
    for option in settings:
        if option != "skip":
            hint = f"give options to its passes: {','.join(known)}"
            raise UsageError(f"{name!r} is a list of passes and has no option {option!r}", hint)
    for word in skipped:
        if word not in known:
            raise UsageError(f"the list {name!r} holds no pass {word!r}", did_you_mean(word, known))
    return [entry for entry in entries if entry[0] not in skipped]


def _entry(text: str, previous: str) -> tuple[str, dict[str, str]]:
    """(name, option texts) of one pass. previous: the pass before it, which a stray option may belong to."""
    file = _FILE.fullmatch(text)
    name = file["name"] if file else re.split(r"[:{]", text, maxsplit=1)[0]
    rest = (file["rest"] or "") if file else text[len(name) :]
    if not file and text.split(":")[0].endswith(".py"):
        raise UsageError(f"{text!r} names a file but no class", f"write {text.split(':')[0]}:CLASS")
    if "=" in name:
        raise stray(text, previous)
    return name.strip(), dict(_options(name.strip(), rest))


def stray(word: str, previous: str = "NAME") -> OnnxoptError:
    """The error for an option that stands where a pass or nothing should: most often braces that the shell expanded."""
    return UsageError(
        f"{word!r} stands alone, but looks like an option of a pass",
        f"write options after their pass, without spaces: {previous}:{word}; quote the list where it has braces",
    )


def _options(name: str, rest: str) -> Iterator[tuple[str, str]]:
    if rest.startswith("{"):
        if not rest.endswith("}"):
            raise UsageError(f"pass {name!r}: the brace is not closed in {name + rest!r}", f"write {name}{{key=value}}")
        parts = _split(rest[1:-1], ",") if rest[1:-1].strip() else []
    else:
        parts = _split(rest[1:], ":") if rest else []
    seen: set[str] = set()
    for part in parts:
        key, equals, value = part.strip().partition("=")
        if not equals:
            raise UsageError(
                f"pass {name!r}: {part.strip()!r} is no option, options read key=value",
                f"run: onnxopt passes {name}",
            )
        if key in seen:
            raise UsageError(f"pass {name!r}: option {key!r} is given twice", "keep one of the two")
        seen.add(key)
        yield key, _unquoted(value)


def _split(text: str, separator: str) -> list[str]:
    """`text` at separators that stand outside quotes and braces."""
    parts, start, depth, quote = [], 0, 0, ""
    for at, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "{}":
            depth += 1 if char == "{" else -1
        elif char == separator and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    if quote:
        raise UsageError(f"a quote is not closed in {text!r}", f"add the closing {quote}")
    return [*parts, text[start:]]


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _quoted(text: str) -> str:
    if not _NEEDS_QUOTES.search(text):
        return text
    return f"'{text}'" if '"' in text else f'"{text}"'


def _unquoted(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return text
