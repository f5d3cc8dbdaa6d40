"""Edits of a whole model that cost no more than what they touch.

Nodes are added and removed without searching or moving lists of nodes; `finish` writes the lists once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from onnxopt.graph import Names, detach, drop_unused, operators, replace_inputs, sort_nodes
from onnxopt.model import Constant, Graph, Model, Node, Variable


class Edits:
    """Pending edits of a model, local functions left out.

    home: id(node) -> the body that holds it. outputs: id(tensor) -> where bodies give it out, (body, position).
    touched: nodes whose surroundings the last `replace` changed.
    """

    def __init__(self, model: Model, normalized: bool = False) -> None:
        """normalized: nothing has changed since the model was."""
        if not normalized:
            model.normalize()
        self.model = model
        self.home: dict[int, Graph] = {}
        self.outputs: dict[int, list[tuple[Graph, int]]] = {}
        self.touched: list[Node] = []
        self._added: dict[int, list[Node]] = {}
        self._gone: dict[int, Node] = {}
        self._unread: dict[int, Constant] = {}
        self._changed: dict[int, Graph] = {}
        bodies = list(self.bodies())
        for body in bodies:
            self.home.update((id(node), body) for node in body.nodes)
            for at, tensor in enumerate(body.outputs):
                self.outputs.setdefault(id(tensor), []).append((body, at))
        self._kept = [tensor for body in bodies for tensor in body.outputs]

    @cached_property
    def names(self) -> Names:
        """Hands out names that are free everywhere."""
        return Names(self.model)

    def bodies(self) -> Iterator[Graph]:
        """The main graph and the bodies within it."""
        return (body for body in self.model.bodies() if body.function is None)

    def is_alive(self, node: Node) -> bool:
        """Whether the node is still part of the model."""
        return id(node) in self.home

    # edits

    def add(self, nodes: Iterable[Node], at: Node) -> None:
        """Put nodes before `at`, into its body."""
        body = self.home[id(at)]
        for node in nodes:
            self.home[id(node)] = body
            self._added.setdefault(id(at), []).append(node)
        self._changed[id(body)] = body

    def replace(
        self, root: Node, values: Sequence[Any], made: Sequence[Node], matched: Sequence[Node], copy: bool = False
    ) -> bool:
        """Let `values` stand for the outputs of `root`: tensors of nodes just made or any others, None for unread ones.

        Of the matched nodes those go that nobody reads any more, and with them what only they read. Returns False, with
        nothing changed, where `root` would only become an Identity that gives an output its name, unless `copy`.
        """
        self.touched = []
        fresh = {id(tensor): node for node in made for tensor in node.outputs}
        pairs = [(old, new) for old, new in zip(root.outputs, values, strict=True) if new is not None]
        again = {id(old) for at, (old, new) in enumerate(pairs) if any(new is other for _, other in pairs[:at])}
        copies = [
            old
            for old, new in pairs
            if (id(new) not in fresh or id(old) in again) and not self._can_stand_for(new, old, root)
        ]
        if copies and len(matched) == 1 and not copy:
            for node in made:
                detach(node)
            return False
        self.add(made, root)
        root.outputs.clear()
        given: dict[int, Any] = {}  # a node just made may stand for several outputs; the first one is what it makes
        for old, new in pairs:
            if id(new) in fresh and id(new) not in given:
                self._give(fresh[id(new)], new, old, root)
                given[id(new)] = old
            elif any(old is each for each in copies):
                name = self.names.node(root.name or f"{old.name}_Identity")
                identity = Node("Identity", name, inputs=[given.get(id(new), new)], outputs=[old])
                self.add([identity], root)
                self.touched.append(identity)
            else:
                self._redirect(old, given.get(id(new), new))
        self.touched += made
        self.remove(matched)
        return True

    def forget(self, body: Graph) -> None:
        """Take no account any more of a body that a rule takes apart."""
        for tensor in body.outputs:
            self.outputs[id(tensor)] = [place for place in self.outputs.get(id(tensor), []) if place[0] is not body]

    def redirect(self, old: Any, new: Any) -> bool:
        """Let all readers of `old` read `new`; False where `old` must stay because a body gives it out."""
        self.touched = []
        node = old.inputs[0]
        if not self._can_stand_for(new, old, node):
            return False
        at = next(at for at, tensor in enumerate(node.outputs) if tensor is old)
        node.outputs[at] = Variable.empty()
        self._redirect(old, new)
        return True

    def remove(self, nodes: Iterable[Node]) -> None:
        """Take out those nodes whose outputs nobody reads, and the pure nodes and constants that only they read."""
        pending = list(nodes)[::-1]
        asked = {id(node) for node in pending}
        while pending:
            node = pending.pop()
            dead = id(node) in self.home and not any(self.is_used(tensor) for tensor in node.outputs)
            if not dead or not (id(node) in asked or operators.is_pure(node)):
                continue
            body = self.home.pop(id(node))
            self._changed[id(body)] = body
            self._gone[id(node)] = node
            sources = self._leave(node)
            detach(node)
            for tensor in sources:
                pending += tensor.inputs
                if isinstance(tensor, Constant):
                    self._unread[id(tensor)] = tensor
                elif len(tensor.outputs) == 1:
                    self.touched += tensor.outputs

    def _leave(self, node: Node) -> list[Any]:
        """Take no account any more of what stands within a node; returns all tensors that were read for it."""
        sources = list(node.inputs)
        for body in Node.graphs(node):
            self.forget(body)
            for inner in body.nodes:
                self.home.pop(id(inner), None)
                self._gone[id(inner)] = inner
                sources += self._leave(inner)
        return sources

    def is_used(self, tensor: Any) -> bool:
        """Whether a node reads the tensor or a body gives it out."""
        return not tensor.is_empty() and (bool(tensor.outputs) or bool(self.outputs.get(id(tensor))))

    def finish(self) -> None:
        """Write the lists of nodes, in order, and drop constants that lost their last reader."""
        if not self._changed and not self._unread:
            return
        for body in self._changed.values():
            body.nodes = self._written(body.nodes)
        self._added.clear()
        drop_unused(self._unread.values(), self.model)
        self._unread.clear()
        self.model.normalize()
        for body in self._changed.values():
            sort_nodes(body)
        self._changed.clear()
        self._gone.clear()

    # what stands for what

    def _can_stand_for(self, new: Any, old: Any, root: Node) -> bool:
        """Whether the uses of `old` can be given to `new`, the names of the signature kept."""
        places = self.outputs.get(id(old))
        if not places:
            return True
        source = new.inputs[0] if isinstance(new, Variable) and new.inputs else None
        same_body = source is not None and self.home.get(id(source)) is self.home[id(root)]
        return same_body and not self.outputs.get(id(new)) and len(places) == 1

    def _redirect(self, old: Any, new: Any) -> None:
        """Give the uses of `old` to `new`; where `old` is an output, `new` takes its name by becoming it."""
        for source in new.inputs:  # its body may have to be sorted anew, for readers that stand before it
            self._changed[id(self.home[id(source)])] = self.home[id(source)]
        if not self.outputs.get(id(old)):
            self.touched += old.outputs
            self._keep_scalars(old, new)
            replace_inputs(old, new)
            return
        source = new.inputs[0]
        replace_inputs(new, old)
        at = next(at for at, tensor in enumerate(source.outputs) if tensor is new)
        source.outputs[at] = old
        self.touched += [source, *old.outputs]

    def _keep_scalars(self, old: Any, new: Any) -> None:
        """A Range takes vectors of one element while they are computed, but constants only as scalars."""
        if not isinstance(new, Constant) or new.shape != (1,):
            return
        for reader in [node for node in old.outputs if node.kind == ("", "Range")]:
            scalar = Constant(self.names.tensor(f"{new.name}_scalar"), new.values.reshape(()))
            reader.inputs = [scalar if tensor is old else tensor for tensor in reader.inputs]

    def _give(self, maker: Node, new: Variable, old: Variable, root: Node) -> None:
        """Let a new node make `old`, and be called as `root` was where it makes the first output."""
        replace_inputs(new, old)
        at = next(at for at, tensor in enumerate(maker.outputs) if tensor is new)
        maker.outputs[at] = old
        if maker.proto is None:
            maker.name, maker.proto = root.name, root.proto
            maker.position = None
        self.touched += old.outputs

    def _written(self, nodes: Iterable[Node]) -> list[Node]:
        """A list of nodes with what was added, without what is gone."""
        written: list[Node] = []
        for node in nodes:
            if id(node) in self._added:
                written += self._in_place_of(node)
            elif id(node) not in self._gone:
                written.append(node)
        return written

    def _in_place_of(self, node: Node) -> Iterator[Node]:
        """The nodes added before a node, what was added before those, and itself, without those that are gone."""
        pending: list[tuple[Node, bool]] = [(node, False)]
        while pending:
            current, expanded = pending.pop()
            if expanded or id(current) not in self._added:
                if id(current) not in self._gone:
                    yield current
                continue
            pending.append((current, True))
            pending += [(each, False) for each in reversed(self._added[id(current)])]
