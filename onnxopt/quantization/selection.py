"""Which nodes a user wants a quantizing pass to touch: by name, or by a pattern of names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from onnxopt.graph.edit import label
from onnxopt.model import Node


@dataclass(frozen=True)
class Selection:
    """exclude: nodes to leave alone. only: where any is given, all others are left alone too.

    Each entry is the name of a node as reports show it (`label`) or a pattern of such names: `*`, `?`, `[abc]`.
    """

    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def refusal(self, node: Node) -> str | None:
        """Why `node` is left alone; None when it is wanted."""
        found = next((pattern for pattern in self.exclude if _matches(label(node), pattern)), None)
        if found is not None:
            return f"excluded by {found!r}"
        if self.only and not any(_matches(label(node), pattern) for pattern in self.only):
            return f"not among only={'+'.join(self.only)}"
        return None

    def unmatched(self, nodes: Iterable[Node]) -> list[str]:
        """The patterns that fit none of `nodes`, in order: most likely misspelt."""
        names = [label(node) for node in nodes]
        return [p for p in (*self.exclude, *self.only) if not any(_matches(name, p) for name in names)]


def _matches(name: str, pattern: str) -> bool:
    # names may hold brackets of their own
    return name == pattern or fnmatchcase(name, pattern)
