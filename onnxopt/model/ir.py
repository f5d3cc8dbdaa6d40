"""graphsurgeon's classes with identity, memory of their protos, and read-only values.

graphsurgeon compares nodes by structure and tensors by name, which makes detaching n consumers quadratic and worse.
Here nodes and tensors are equal only to themselves and can be keys of dicts and members of sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, ValueInfoProto
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxopt.errors import PassError
from onnxopt.model.tensor_data import TensorData

Dim = int | str | None


class Variable(gs.Variable):
    """A tensor known only when the model runs. `info` is the ValueInfoProto it was described by, if any."""

    info: ValueInfoProto | None = None
    # (dtype, shape) as read or inferred: only what a pass changes after that is written into the file's descriptions
    baseline: tuple[Any, tuple[Dim, ...] | None] | None = None
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @staticmethod
    def empty() -> Variable:
        """An omitted optional input or output."""
        return Variable(name="")

    def settle(self) -> None:
        """Take the present dtype and shape as known facts, not as a pass's change."""
        self.baseline = (self.dtype, None if self.shape is None else tuple(self.shape))

    def redescribed(self) -> bool:
        """Whether a pass changed dtype or shape since the tensor was read or inferred."""
        return self.baseline != (self.dtype, None if self.shape is None else tuple(self.shape))


@dataclass(frozen=True)
class Origin:
    """Where in the file a constant came from, so that it can go back there untouched."""

    kind: str  # "initializer", "sparse_initializer" or "node"
    position: int
    data: TensorData
    node: NodeProto | None = None
    attribute: AttributeProto | None = None


class Constant(gs.Constant):
    """A tensor whose values are known: an initializer, a sparse initializer or a Constant node of the file.

    `values` is a read-only array; assign a new array to replace it. `data` is the TensorData behind it.
    """

    origin: Origin | None = None
    info: ValueInfoProto | None = None
    _values: Any
    _export_dtype: Any
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(self, name: str, values: NDArray[Any] | TensorData) -> None:
        super().__init__(name, values)

    @property
    def data(self) -> TensorData:
        """The immutable content."""
        if not isinstance(self._values, TensorData):
            array = self._values.load() if isinstance(self._values, LazyValues) else np.asarray(self._values)
            wanted = self._export_dtype
            if wanted is not None and not isinstance(wanted, int):
                array = array.astype(wanted)
            self._values = TensorData.from_array(array)
        return self._values

    @property
    def values(self) -> NDArray[Any]:
        """The values as a read-only array."""
        return self.data.array()

    @values.setter
    def values(self, values: NDArray[Any] | TensorData) -> None:
        self._export_dtype = None
        self._values = values if isinstance(values, TensorData) else TensorData.from_array(np.asarray(values))

    @property
    def shape(self) -> tuple[int, ...]:
        """Dims of the values."""
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        """Element type of the values."""
        return self.data.dtype


class Node(gs.Node):
    """An operator call. `proto` is the NodeProto it came from, without inputs, outputs and attributes."""

    proto: NodeProto | None = None
    # attribute name -> (its proto without graphs, the value it was shown as)
    attribute_protos: dict[str, tuple[AttributeProto, Any]] | None = None
    position: int | None = None
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def kind(self) -> tuple[str, str]:
        """(domain, operator type), with the default domain always spelled ""."""
        domain = self.domain or ""
        return ("" if domain == "ai.onnx" else domain, self.op)

    def graphs(self) -> Iterator[Graph]:
        """The bodies held in this node's attributes, in attribute order."""
        for value in self.attrs.values():
            if isinstance(value, gs.Graph):
                yield value
            elif isinstance(value, list) and value and isinstance(value[0], gs.Graph):
                yield from value


def _banned(name: str, instead: str) -> Any:
    def method(self: Graph, *_: object, **__: object) -> NoReturn:
        raise PassError(
            f"Graph.{name}() was called on {self.name!r}: graphsurgeon's version loses or corrupts parts of models",
            f"call {instead}",
        )

    return method


class Graph(gs.Graph):
    """One body: the main graph or the graph attribute of a node.

    `initializers` lists every Constant that lives here (initializers, sparse initializers and Constant nodes), used or
    not. `defaults` are the overridable initializers: graph inputs that come with a value. `parent` and `owner` are the
    enclosing body and the node whose attribute holds this one; both None for the main graph and for functions.
    """

    is_function: ClassVar[bool] = False
    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def __init__(self, name: str, nodes: Sequence[Node] = (), **kwargs: Any) -> None:
        self.proto: GraphProto | FunctionProto | None = None
        self.initializers: list[Constant] = []
        self.defaults: list[tuple[Variable, TensorData, int]] = []
        self.parent: Graph | None = None
        self.owner: Node | None = None
        self.function: Function | None = None
        # order of the file: input entries incl. initializers listed as inputs (IR < 4), value_info, outputs by name
        self.listed_inputs: list[Any] = []
        self.value_infos: list[tuple[Any, ValueInfoProto]] = []
        self.output_infos: dict[str, list[ValueInfoProto]] = {}
        # tensors that the entries of proto.quantization_annotation name, None where the file defines none
        self.annotated: list[Any] = []
        # the file has a Constant node behind one of its readers: all stay where they are until the body is sorted
        self.unsorted_constants = False
        super().__init__(nodes=list(nodes), name=name, **kwargs)

    cleanup = _banned("cleanup", "onnxopt.graph.remove_dead(model)")
    toposort = _banned("toposort", "onnxopt.graph.sort_nodes(body)")
    fold_constants = _banned("fold_constants", "the pass fold_constants, or list it in `prepare`")
    copy = _banned("copy", "Model.clone() or Model.snapshot()")

    def ancestors(self) -> Iterator[Graph]:
        """This body, then the enclosing ones, inner first."""
        body: Graph | None = self
        while body is not None:
            yield body
            body = body.parent


class Function(Graph):
    """A local function of the model. Its nodes see nothing of the main graph; it has no initializers of its own."""

    is_function: ClassVar[bool] = True

    def __init__(self, name: str, domain: str, overload: str, **kwargs: Any) -> None:
        self.domain = domain
        self.overload = overload
        super().__init__(name, **kwargs)


def adopt_classes(body: gs.Graph) -> None:
    """Turn plain graphsurgeon nodes and tensors that a pass put into `body` into ours, in place."""
    for node in body.nodes:
        if type(node) is gs.Node:
            node.__class__ = Node
        for tensor in (*node.inputs, *node.outputs):
            _adopt(tensor)
    for tensor in (*body.inputs, *body.outputs):
        _adopt(tensor)


def _adopt(tensor: Any) -> None:
    if type(tensor) is gs.Variable:
        tensor.__class__ = Variable
    elif type(tensor) is gs.Constant:
        tensor.__class__ = Constant
