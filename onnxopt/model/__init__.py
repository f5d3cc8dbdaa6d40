"""File <-> Model: the one place where protos are read and written."""

from onnxopt.model.ir import Constant, Function, Graph, Node, Variable
from onnxopt.model.limits import Limits, LimitsLike
from onnxopt.model.loading import load
from onnxopt.model.model import Clone, Model, Snapshot
from onnxopt.model.tensor_data import TensorData

__all__ = [
    "Clone",
    "Constant",
    "Function",
    "Graph",
    "Limits",
    "LimitsLike",
    "Model",
    "Node",
    "Snapshot",
    "TensorData",
    "Variable",
    "load",
]
