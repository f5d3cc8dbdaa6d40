"""Which nodes a pass may touch: `only` and `exclude`, names or patterns of nodes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from onnxopt.errors import UsageError, did_you_mean
from onnxopt.graph.edit import label
from onnxopt.model import Model, Node


@dataclass(frozen=True)
class Selection:
    """Names or shell-like patterns (`*`, `?`, `[...]`) of nodes. only: empty for all. exclude: wins over `only`.

    A node is called by its name, or where it has none by what reports call it.
    """

    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def refuses(self, node: Node) -> str | None:
        """Why the node is not to be touched, or None."""
        found = next((pattern for pattern in self.exclude if _matches(node, (pattern,))), None)
        if found is not None:
            return f"excluded by {found!r}"
        if self.only and not _matches(node, self.only):
            return f"not among only={'+'.join(self.only)}"
        return None

    def excludes(self, node: Node) -> bool:
        """Whether the node was excluded by name, whatever `only` says."""
        return _matches(node, self.exclude)

    def check(self, model: Model, of: str) -> None:
        """Raise UsageError for a name or pattern that no node of the model has; of: the pass that was given it."""
        if not self.only and not self.exclude:
            return
        nodes = [node for body in model.bodies() for node in body.nodes]
        names = {name for node in nodes for name in _names(node)}
        for pattern in (*self.only, *self.exclude):
            if not any(_same(name, pattern) for name in names):
                raise UsageError(f"pass {of!r}: no node is called {pattern!r}", did_you_mean(pattern, sorted(names)))


def _matches(node: Node, patterns: Iterable[str]) -> bool:
    return any(_same(name, pattern) for name in _names(node) for pattern in patterns)


def _names(node: Node) -> set[str]:
    return {node.name, label(node)} - {""}


def _same(name: str, pattern: str) -> bool:
    # names may hold brackets of their own
    return name == pattern or fnmatchcase(name, pattern)
