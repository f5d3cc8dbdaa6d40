"""Rules and the fix-point that applies them."""

from __future__ import annotations

import functools
import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from onnxopt.errors import PassError
from onnxopt.graph import label
from onnxopt.graph.sort import sorted_nodes
from onnxopt.model import Model, Node
from onnxopt.passbase import Change, Context, PassResult, Skip
from onnxopt.rewriting.edits import Edits
from onnxopt.rewriting.make import Make
from onnxopt.rewriting.pattern import Match, Op
from onnxopt.rewriting.view import View

# what `check` returns for nodes that are no candidates at all, so that nothing is reported of them
LOOKS_ALIKE = ""
# names of the rules kept of each node's descent, to be told where rules chase each other
_REMEMBERED = 6
_MOST_ROUNDS = 64


class Rule:
    """One algebraic step: `pattern`, then `check`, then `rewrite`.

    pattern: a tree of operators, or several. shared: the nodes before the last one may have other readers, who keep
    them; otherwise such a place is left alone. copies: an Identity is better than the node, where the name of an output
    has to be kept. done: how the change is called in the report.
    """

    pattern: ClassVar[Op | tuple[Op, ...]]
    shared: ClassVar[bool] = False
    copies: ClassVar[bool] = False
    done: ClassVar[str] = "rewritten"

    @property
    def name(self) -> str:
        """The class's name in words."""
        return _in_words(type(self).__name__)

    def check(self, found: Match, view: View) -> str | None:
        """Why these nodes must stay as they are: a reason for the report, LOOKS_ALIKE, or None where they may go."""
        return None

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        """What stands for the output of the last node: a tensor, old or new; a list of them for several outputs."""
        raise NotImplementedError(f"{type(self).__name__} has no rewrite")


def rewrite(model: Model, rules: Iterable[Rule], context: Context | None = None) -> PassResult:
    """Apply rules in all bodies until none applies; local functions are left alone.

    Raises PassError where rules undo each other, naming them.
    """
    given = list(rules)
    model.normalize()
    if not _has_candidates(model, given):
        return PassResult([], _functions(model))
    driver = _Driver(model, given, context)
    driver.run()
    return PassResult(driver.changes, driver.skips())


@dataclass
class _Driver:
    model: Model
    rules: list[Rule]
    context: Context | None
    changes: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.edits = Edits(self.model, normalized=True)
        self.view = View(self.model, self.edits, self.context.target if self.context else None)
        self.by_kind: dict[tuple[str, str], list[tuple[Rule, Op]]] = {}
        for rule in self.rules:
            for pattern in _patterns(rule):
                for op in pattern.ops:
                    self.by_kind.setdefault((pattern.domain, op), []).append((rule, pattern))
        self.reach = max((pattern.depth for rule in self.rules for pattern in _patterns(rule)), default=1)
        self.refused: dict[tuple[int, str], tuple[Node, str]] = {}
        self.pending: deque[Node] = deque()
        self.queued: set[int] = set()
        self.descent: dict[int, tuple[int, tuple[str, ...]]] = {}
        self.most = 2 * self.model.node_count() + 100
        self.held: list[Node] = []  # identities of nodes that were rewritten stay taken

    def run(self) -> None:
        for _ in range(_MOST_ROUNDS):
            before = len(self.changes)
            for body in self.edits.bodies():
                self.queue(sorted_nodes(body))
            while self.pending:
                node = self.pending.popleft()
                self.queued.discard(id(node))
                if self.edits.is_alive(node):
                    self.visit(node)
            self.edits.finish()
            if len(self.changes) == before or not self.view.asked:
                return
            self.view.refresh()

    def queue(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if id(node) not in self.queued and node.kind in self.by_kind and self.edits.is_alive(node):
                self.queued.add(id(node))
                self.pending.append(node)

    def visit(self, node: Node) -> None:
        for rule, _ in self.by_kind[node.kind]:
            self.refused.pop((id(node), rule.name), None)
        for rule, pattern in self.by_kind[node.kind]:
            for found in pattern.of(node):
                reason = self.reason(rule, found)
                if reason:
                    self.refused[id(node), rule.name] = (node, reason)
                if reason is None and self.apply(rule, found):
                    self.refused.pop((id(node), rule.name), None)
                    return

    def reason(self, rule: Rule, found: Match) -> str | None:
        reason = rule.check(found, self.view)
        if reason is not None or rule.shared:
            return reason
        inner = {id(node) for node in found.nodes}
        for node in found.nodes[1:]:
            if self.edits.home.get(id(node)) is not self.edits.home[id(found.root)]:
                return f"{node.op} {label(node)} stands in another body"
            for tensor in node.outputs:
                if self.view.is_output(tensor) or any(id(reader) not in inner for reader in tensor.outputs):
                    return f"the result of {node.op} {label(node)} is used elsewhere too"
        return None

    def apply(self, rule: Rule, found: Match) -> bool:
        root, name = found.root, label(found.root)
        before = ", ".join(f"{node.op} {label(node)}" for node in reversed(found.nodes[1:]))
        make = Make(self.edits, root)
        result = rule.rewrite(found, make, self.view)
        values: Sequence[Any] = result if isinstance(result, list) else [result]
        values = [*values, *[None] * (len(root.outputs) - len(values))]
        pairs = zip(root.outputs, values, strict=True)
        missing = [old.name for old, new in pairs if new is None and self.edits.is_used(old)]
        if missing:
            raise PassError(
                f"rule {rule.name} gives nothing for the output {missing[0]!r} of {root.op} {name}, which is read",
                "return a list with a tensor for each output of the last node that is in use",
            )
        if not self.edits.replace(root, values, make.nodes, found.nodes, rule.copies):
            self.refused[id(root), rule.name] = (root, "it gives an output of the graph its name")
            return False
        self.follow(rule, found, make, name)
        self.held += found.nodes
        after = " and ".join(node.op for node in make.nodes)
        detail = f"{rule.name}: {root.op}" + (f" with {before}" if before else "") + (f", now {after}" if after else "")
        self.changes.append(Change(rule.done, name, detail))
        self.queue(self.around(self.edits.touched))
        return True

    def follow(self, rule: Rule, found: Match, make: Make, name: str) -> None:
        """Keep count of rewrites that made no fewer nodes, along each line of descent."""
        count, line = max((self.descent.get(id(node), (0, ())) for node in found.nodes), key=lambda each: each[0])
        gone = sum(not self.edits.is_alive(node) for node in found.nodes)
        line = (*line, rule.name)[-_REMEMBERED:]
        count += gone <= len(make.nodes)
        for node in make.nodes:
            self.descent[id(node)] = (count, line)
        if count > self.most:
            raise PassError(
                f"rules undo each other without end at {name!r}: {', '.join(sorted(set(line)))}",
                "leave one of them out, or let its check refuse what the other one writes",
            )

    def around(self, nodes: Iterable[Node]) -> list[Node]:
        """The nodes and what reads them, as far as a pattern reaches."""
        found = {id(node): node for node in nodes}
        edge = list(found.values())
        for _ in range(self.reach - 1):
            edge = [reader for node in edge for tensor in node.outputs for reader in tensor.outputs]
            edge = [node for node in {id(node): node for node in edge}.values() if id(node) not in found]
            found.update((id(node), node) for node in edge)
        return list(found.values())

    def skips(self) -> list[Skip]:
        alive = [(node, reason) for node, reason in self.refused.values() if self.edits.is_alive(node)]
        return [Skip(label(node), reason) for node, reason in alive] + _functions(self.model)


def _has_candidates(model: Model, rules: Sequence[Rule]) -> bool:
    """Whether there is a node that a pattern may end with."""
    kinds = {(pattern.domain, op) for rule in rules for pattern in _patterns(rule) for op in pattern.ops}
    return any(node.kind in kinds for body in model.bodies() if body.function is None for node in body.nodes)


def _functions(model: Model) -> list[Skip]:
    reason = "a local function; inline_functions brings it into the graph"
    return [Skip(function.name, reason) for function in model.functions]


@functools.cache
def _in_words(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name.lstrip("_")).lower()


def _patterns(rule: Rule) -> tuple[Op, ...]:
    return rule.pattern if isinstance(rule.pattern, tuple) else (rule.pattern,)
