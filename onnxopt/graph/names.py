"""One allocator of unique names over all scopes of a model."""

from __future__ import annotations

from onnxopt.model import Model


class Names:
    """Hands out tensor and node names that no body of the model uses, readable and deterministic."""

    def __init__(self, model: Model) -> None:
        self._taken: set[str] = set()
        self._next: dict[str, int] = {}
        for body in model.bodies():
            self._taken.update(tensor.name for tensor in (*body.inputs, *body.outputs, *body.initializers))
            for node in body.nodes:
                self._taken.add(node.name)
                self._taken.update(tensor.name for tensor in (*node.inputs, *node.outputs))

    def new(self, base: str) -> str:
        """`base` itself when free, else `base_1`, `base_2`, ..."""
        name, number = base, self._next.get(base, 0)
        while not name or name in self._taken:
            number += 1
            name = f"{base}_{number}"
        self._next[base] = number
        self._taken.add(name)
        return name

    tensor = new
    node = new
