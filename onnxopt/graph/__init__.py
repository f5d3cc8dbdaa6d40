"""Services over graphs: names, order, dead code, edits, shapes, operators."""

from onnxopt.graph.dead import detach, remove_dead
from onnxopt.graph.edit import (
    NodeEdits,
    drop_unused,
    insert_before,
    is_output,
    label,
    remove_node,
    replace_inputs,
    replace_uses,
)
from onnxopt.graph.names import Names
from onnxopt.graph.shapes import infer
from onnxopt.graph.sort import sort_model, sort_nodes

__all__ = [
    "Names",
    "NodeEdits",
    "detach",
    "drop_unused",
    "infer",
    "insert_before",
    "is_output",
    "label",
    "remove_dead",
    "remove_node",
    "replace_inputs",
    "replace_uses",
    "sort_model",
    "sort_nodes",
]
