"""The model in memory: graphs that passes edit, and all that graphsurgeon has no place for."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from onnx import ModelProto, OperatorSetIdProto, TensorProto

from onnxopt.errors import ModelError
from onnxopt.model import files, saving
from onnxopt.model.collection import collection_paused
from onnxopt.model.exporter import Exporter, WriteTensor, inline
from onnxopt.model.external import ExternalData
from onnxopt.model.importer import Importer
from onnxopt.model.ir import Constant, Function, Graph, Node, Variable, adopt_classes
from onnxopt.model.protos import copy_without
from onnxopt.model.tensor_data import TensorData

_TOKEN = "onnxopt:"
# initializers from this size on are handed to the runtime beside the skeleton instead of within it
SKELETON_THRESHOLD = 1024


@dataclass(frozen=True)
class Snapshot:
    """A model's skeleton and references to its immutable tensors: O(nodes) to take, no weights copied."""

    skeleton: bytes
    tensors: dict[str, TensorData]


@dataclass(frozen=True)
class Clone:
    """A second model over the same weights. `tensors` maps id(variable of the original) to the clone's variable."""

    model: Model
    tensors: dict[int, Variable]


class Model:
    """An ONNX model: `graph`, `functions`, and the carrier proto with every model-level field.

    Build it with `onnxopt.model.load`. Passes edit the graphs in place; `to_proto` and `save` rebuild the file.
    """

    def __init__(self, carrier: ModelProto, graph: Graph, functions: list[Function], path: Path | None = None) -> None:
        self.carrier = carrier
        self.graph = graph
        self.functions = functions
        self.path = path

    @classmethod
    def from_proto(
        cls,
        proto: ModelProto,
        path: Path | None = None,
        read_tensor: Callable[[TensorProto], TensorData] | None = None,
    ) -> Model:
        """Build a model from a ModelProto, which is neither kept nor changed."""
        if read_tensor is None:
            external = ExternalData(path.parent).read if path is not None else None
            read_tensor = functools.partial(TensorData.from_proto, read_external=external)
        importer = Importer(proto, read_tensor)
        carrier = copy_without(proto, "graph", "functions")
        with collection_paused():
            return cls(carrier, importer.main_graph(), importer.functions(), path)

    # model-level fields

    @property
    def opset(self) -> int:
        """Version of the default operator set. Setting it changes the import, not the nodes."""
        return self.opset_imports.get("", 1)

    @opset.setter
    def opset(self, version: int) -> None:
        self.import_opset("", version)

    @property
    def opset_imports(self) -> dict[str, int]:
        """Operator set domain -> version, the default domain spelled ""."""
        return {_domain(entry.domain): entry.version for entry in self.carrier.opset_import}

    def import_opset(self, domain: str, version: int) -> None:
        """Set the version of an operator set, importing the domain where it is not yet."""
        for entry in self.carrier.opset_import:
            if _domain(entry.domain) == _domain(domain):
                entry.version = version
                break
        else:
            self.carrier.opset_import.append(OperatorSetIdProto(domain=domain, version=version))
        for body in self.bodies():
            if body.function is None:
                body.import_domains = list(self.carrier.opset_import)
                body.opset = self.opset

    @property
    def ir_version(self) -> int:
        """IR version of the file."""
        return int(self.carrier.ir_version)

    @ir_version.setter
    def ir_version(self, version: int) -> None:
        self.carrier.ir_version = version

    @property
    def metadata(self) -> dict[str, str]:
        """The model's metadata_props, a copy."""
        return {entry.key: entry.value for entry in self.carrier.metadata_props}

    # walking

    def bodies(self) -> Iterator[Graph]:
        """Main graph, the bodies within it (outer first), then each function and the bodies within it."""
        for root in (self.graph, *self.functions):
            yield from _nested(root, root if isinstance(root, Function) else None)

    def constants(self) -> Iterator[Constant]:
        """Every constant of every body, used or not."""
        for body in self.bodies():
            yield from body.initializers

    def node_count(self) -> int:
        """Nodes of all bodies; Constant nodes count as weights, not as nodes."""
        return sum(len(body.nodes) for body in self.bodies())

    def parameters(self) -> int:
        """Elements of the distinct constants that hold numbers of at least one axis, shapes and scalars left out."""
        seen = {constant.data.uid: constant.data for constant in self.constants()}
        return sum(data.size for data in seen.values() if data.shape and data.dtype != np.dtype(np.int64))

    # rewriting

    def normalize(self) -> None:
        """Make what passes wrote consistent.

        Our classes; every constant in a body that encloses its uses; and no tensor of an inner body hides, by its name,
        one of an outer body that is read within: the inner one gets another name.
        """
        bodies = list(self.bodies())
        for body in bodies:
            adopt_classes(body)
        self._home_constants(bodies)
        if any(body.parent is not None for body in bodies):
            self._unhide_names()

    def _unhide_names(self) -> None:
        defined = {id(body): {tensor.name: tensor for tensor in _defined(body)} for body in self.bodies()}
        names: set[str] | None = None
        for body in self.bodies():
            for tensor in _read(body) if body.parent is not None else ():
                hiding = _hiding(tensor, body, defined)
                if hiding is None:
                    continue
                names = _all_names(self, set()) if names is None else names
                where, hidden_by = hiding
                fresh = _fresh(hidden_by.name, names)
                names.add(fresh)
                del defined[id(where)][hidden_by.name]
                defined[id(where)][fresh] = hidden_by
                if hidden_by.name in where.output_infos:
                    where.output_infos[fresh] = where.output_infos.pop(hidden_by.name)
                hidden_by.name = fresh

    def _home_constants(self, bodies: list[Graph]) -> None:
        home = {id(constant): body for body in bodies for constant in body.initializers}
        moved: dict[int, tuple[Constant, Graph]] = {}
        for body in bodies:
            for constant in _constants_read(body):
                present = moved[id(constant)][1] if id(constant) in moved else home.get(id(constant))
                wanted = body if present is None else _common(present, body, constant)
                if wanted is not present:
                    moved[id(constant)] = (constant, wanted)
        if not moved:
            return
        names = _all_names(self, set(moved))
        for constant, body in moved.values():
            old = home.get(id(constant))
            if old is not None:
                old.initializers = [other for other in old.initializers if other is not constant]
                constant.origin = None
            if not constant.name or constant.name in names:
                constant.name = _fresh(constant.name or "constant", names)
            names.add(constant.name)
            body.initializers.append(constant)

    def snapshot(self) -> Snapshot:
        """The state now. See `restore`."""
        tensors: dict[str, TensorData] = {}

        def write(data: TensorData, name: str | None, _main: bool) -> TensorProto:
            token = f"{_TOKEN}{data.uid}"
            tensors[token] = data
            return data.to_reference(token, name)

        return Snapshot(self._export(write).SerializeToString(), tensors)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot. Nodes and tensors are new objects afterwards; the weights are the same."""
        other = self._rebuilt(snapshot)
        self.carrier, self.graph, self.functions = other.carrier, other.graph, other.functions

    def clone(self) -> Clone:
        """A second model over the same weights, and where each variable went."""
        self.normalize()
        other = self._rebuilt(self.snapshot())
        tensors: dict[int, Variable] = {}
        for mine, theirs in zip(self.bodies(), other.bodies(), strict=True):
            for here, there in zip(_variables(mine), _variables(theirs), strict=True):
                tensors[id(here)] = there
        return Clone(other, tensors)

    def _rebuilt(self, snapshot: Snapshot) -> Model:
        def read(proto: TensorProto) -> TensorData:
            token = proto.external_data[0].value if proto.external_data else ""
            return snapshot.tensors[token] if token in snapshot.tensors else TensorData.from_proto(proto)

        proto = ModelProto()
        proto.ParseFromString(snapshot.skeleton)
        return Model.from_proto(proto, self.path, read)

    def digest(self) -> str:
        """Hash of the skeleton and the identities of all tensors: equal digests mean nothing was changed."""
        return hashlib.sha256(self.snapshot().skeleton).hexdigest()

    def content_digest(self) -> str:
        """Hash of graph, metadata and values: equal for equal models, whatever files they lie in. Reads all weights."""

        def write(data: TensorData, name: str | None, _main: bool) -> TensorProto:
            return data.to_reference(data.digest().hex(), name)

        return hashlib.sha256(self._export(write).SerializeToString(deterministic=True)).hexdigest()

    # writing

    def to_proto(self) -> ModelProto:
        """The whole model as a proto, values inline. Raises ModelError when it would exceed protobuf's 2 GB."""
        if self.nbytes() > files.INLINE_LIMIT:
            raise ModelError(
                f"the model holds {self.nbytes() / 1e9:.1f} GB of values, more than one protobuf message can",
                "use Model.save, which puts them into a file beside the model",
            )
        return self._export(inline)

    def skeleton(self) -> tuple[ModelProto, dict[str, TensorData]]:
        """(proto, values): the main graph's initializers from 1 KiB on are left out of the proto and given by name.

        The form for the runtime's add_external_initializers; values of inner bodies stay inline, it knows no others.
        """
        tensors: dict[str, TensorData] = {}

        def write(data: TensorData, name: str | None, main: bool) -> TensorProto:
            if not main or name is None or data.nbytes < SKELETON_THRESHOLD or data.dtype.kind == "O":
                return data.to_proto(name)
            tensors[name] = data
            return data.to_reference(f"{_TOKEN}{name}", name)

        proto = self._export(write)
        used = {id(tensor) for tensor in self.graph.outputs}
        idle = {c.name for c in self.graph.initializers if not c.outputs and id(c) not in used} & set(tensors)
        if idle:
            # the runtime drops what nobody reads before it looks for the values handed over, and then misses it
            kept = [tensor for tensor in proto.graph.initializer if tensor.name not in idle]
            proto.graph.ClearField("initializer")
            proto.graph.initializer.extend(kept)
            # before IR 4 they are listed as inputs too, and would have to be given
            listed = [info for info in proto.graph.input if info.name not in idle]
            proto.graph.ClearField("input")
            proto.graph.input.extend(listed)
        return proto, {name: data for name, data in tensors.items() if name not in idle}

    def nbytes(self) -> int:
        """Bytes of all values as stored, shared content counted once per constant that stores it."""
        defaults = (data for body in self.bodies() for _, data, _ in body.defaults)
        return sum(data.stored_nbytes for data in (*(constant.data for constant in self.constants()), *defaults))

    def save(
        self, path: str | Path, verify: Callable[[Path], None] | None = None, *, external_data: str = "auto"
    ) -> Path:
        """Write the model: all of it takes the place of the old file, or nothing does.

        external_data: "always" puts the values from 1 KiB on into a file beside the model, named by its content;
        "never" keeps all in one; "auto" is "never" up to 2 GB and "always" above. A sidecar that only the replaced
        model used is removed. `verify(temporary_path)` is called on the written file before it takes its name, and may
        raise to refuse it. Raises UsageError when the place can't be written, LimitError for "never" above 2 GB.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise _no_folder(path)
        saving.save(path, self._export, self.nbytes(), verify, external_data)
        return path

    def _export(self, write_tensor: WriteTensor) -> ModelProto:
        self.normalize()
        return Exporter(self.ir_version, write_tensor).model(self.carrier, self.graph, list(self.functions))


def _no_folder(path: Path) -> Exception:
    from onnxopt.errors import UsageError

    return UsageError(
        f"can't write {path}: the folder {path.parent} does not exist", "create it, or choose another with -o"
    )


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _nested(body: Graph, function: Function | None) -> Iterator[Graph]:
    body.function = function
    yield body
    for node in body.nodes:
        for inner in Node.graphs(node) if node.attrs else ():
            inner.parent, inner.owner = body, node
            yield from _nested(inner, function)


def _constants_read(body: Graph) -> Iterator[Constant]:
    for node in body.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                yield tensor
    for tensor in body.outputs:
        if isinstance(tensor, gs.Constant):
            yield tensor


def _defined(body: Graph) -> Iterator[Variable | Constant]:
    """The tensors a body gives names to."""
    yield from body.inputs
    yield from body.initializers
    yield from _variables(body)


def _read(body: Graph) -> Iterator[Variable | Constant]:
    """The tensors a body reads, without the bodies within."""
    for node in body.nodes:
        yield from (tensor for tensor in node.inputs if not tensor.is_empty())
    yield from body.outputs


def _hiding(
    tensor: Variable | Constant, body: Graph, defined: dict[int, dict[str, Variable | Constant]]
) -> tuple[Graph, Variable | Constant] | None:
    """The inner body, and its tensor there, that stands between a read and the tensor that is meant."""
    for scope in body.ancestors():
        found = defined[id(scope)].get(tensor.name)
        if found is tensor:
            return None
        if found is not None:
            return (scope, found) if scope.parent is not None else None
    return None


def _common(one: Graph, other: Graph, constant: Constant) -> Graph:
    """The innermost body that encloses both."""
    above = {id(body) for body in one.ancestors()}
    for body in other.ancestors():
        if id(body) in above:
            return body
    raise ModelError(
        f"constant {constant.name!r} is used in two functions, which share no scope",
        "give each function a Constant of its own",
    )


def _variables(body: Graph) -> Iterator[Variable]:
    yield from (tensor for tensor in body.inputs if isinstance(tensor, gs.Variable))
    for node in body.nodes:
        yield from (tensor for tensor in node.outputs if not tensor.is_empty())


def _all_names(model: Model, without: set[int]) -> set[str]:
    names: set[str] = set()
    for body in model.bodies():
        tensors = [*body.inputs, *body.outputs, *body.initializers]
        for node in body.nodes:
            tensors += [*node.inputs, *node.outputs]
        names.update(tensor.name for tensor in tensors if id(tensor) not in without)
    return names


def _fresh(base: str, taken: set[str]) -> str:
    number = 1
    while f"{base}_{number}" in taken:
        number += 1
    return f"{base}_{number}"
