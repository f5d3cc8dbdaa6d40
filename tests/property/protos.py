"""Random ModelProtos that use the whole format.

All float tensors are of shape [2, 4], so that any operator may read any of them and onnxruntime can judge what passes
made of the model. `FEATURES` are added to that; those outside `RUNNABLE` make models no runtime loads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from random import Random
from typing import Any

import numpy as np
from google.protobuf.message import Message
from hypothesis import strategies as st
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tests.property import pieces

RUNNABLE = (
    "bodies", "constants", "docs", "domains", "elements", "functions", "ir3", "layers", "names", "old_opset", "outputs",
    "overridable", "sparse", "training", "trailing", "unsorted", "value_infos",
)  # fmt: skip
FEATURES = (*RUNNABLE, "annotations", "attributes", "types", "unknown")
SHAPE = (2, 4)
UNARY = ("Relu", "Neg", "Sigmoid", "Identity", "Abs", "Tanh")
BINARY = ("Add", "Mul", "Sub", "Max")


class Maker:
    """Makes one model from a seed and the features it may use."""

    def __init__(self, seed: int, features: Iterable[str]) -> None:
        self.random = Random(seed)
        self.features = frozenset(features)
        self.count = 0
        self.functions: list[FunctionProto] = []

    def use(self, feature: str, chance: float = 0.5) -> bool:
        return feature in self.features and self.random.random() < chance

    def fresh(self, base: str = "t") -> str:
        self.count += 1
        return f"{base}{self.count}"

    def model(self) -> ModelProto:
        """The whole model."""
        self.ir = 3 if "ir3" in self.features else self.random.choice((4, 8, 10))
        opset = (
            self.random.choice((9, 11)) if "old_opset" in self.features else self.random.choice((13, 15, 17, 18, 21))
        )
        # onnxruntime wants every initializer of such a file listed as an input
        self.lists_all = self.ir == 3 and self.random.random() < 0.8
        self.spelling = "ai.onnx" if self.use("domains", 0.3) else ""
        self.opset = 11 if self.features & {"bodies", "trailing"} and opset < 11 else opset
        if self.use("functions", 1.0) and self.ir >= 8:
            self.functions = [self.function("f", ""), self.function("f", "other"), self.function("g", "")]
        proto = ModelProto(ir_version=self.ir)
        proto.graph.CopyFrom(self.graph())
        imports = [(self.spelling, self.opset), ("local", 1), ("custom", 3)]
        if self.use("domains"):
            imports.insert(self.random.randrange(3), ("ai.onnx.ml", 3))
        proto.opset_import.extend(helper.make_opsetid(*each) for each in imports)
        proto.functions.extend(self.functions)
        if self.use("training"):
            step = proto.training_info.add()
            step.algorithm.CopyFrom(helper.make_graph([], "algorithm", [], []))
            step.initialization_binding.add(key="a", value="b")
        if "docs" in self.features:
            proto.producer_name, proto.producer_version, proto.domain = "exporter", "", "org.example"
            proto.model_version = self.random.choice((0, 7, -1))
            for message in walk(proto):
                self._document(message)
        if "unknown" in self.features:
            for message in walk(proto):
                if self.random.random() < 0.2:
                    message.MergeFromString(pieces.UNKNOWN)
        return proto

    def _document(self, message: Message) -> None:
        known: Any = message
        if "doc_string" in message.DESCRIPTOR.fields_by_name and self.random.random() < 0.3:
            known.doc_string = self.random.choice(pieces.WORDS)
        if "metadata_props" in message.DESCRIPTOR.fields_by_name and self.random.random() < 0.3:
            for _ in range(self.random.randrange(1, 3)):
                known.metadata_props.add(key=self.random.choice(pieces.WORDS), value=self.random.choice(pieces.WORDS))

    # graphs

    def graph(self) -> GraphProto:
        """The main graph."""
        graph = GraphProto(name="main")
        graph.input.append(
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N" if self.use("value_infos") else 2, 4])
        )
        graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
        visible = ["x", *self._weights(graph)]
        if "types" in self.features:
            graph.input.extend(pieces.value_info(self.random, self.fresh("typed")) for _ in range(2))
        for _ in range(self.random.randrange(1, 7)):
            visible += self.step(graph, visible, 0)
        visible += self.add_unary(graph, visible, 0)
        made = [name for node in graph.node for name in node.output if name in visible]
        outputs = [made[-1], *self.random.sample(made, min(len(made), self.random.randrange(3)))]
        outputs = list(dict.fromkeys(outputs))
        if "outputs" in self.features:
            # a sparse tensor given out directly is left undefined by onnxruntime
            outputs += self.random.sample([name for name in visible if not name.startswith("s")], 1)
            if self.use("outputs"):
                outputs.append(self.random.choice(outputs))
        for name in outputs:
            graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE))
        self._decorate(graph, visible)
        return graph

    def _weights(self, graph: GraphProto) -> list[str]:
        """Initializers: floats, two of them equal, and whatever the features add; returns the readable ones."""
        names = []
        for _ in range(self.random.randrange(1, 5)):
            name = self.fresh("w")
            values = np.random.default_rng(self.random.randrange(3)).standard_normal(SHAPE).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(values, name))
            names.append(name)
            if self.use("overridable") or self.lists_all:
                info = helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE)
                graph.input.insert(self.random.randrange(len(graph.input) + 1), info)
        if self.use("elements", 0.9):
            for _ in range(self.random.randrange(1, 4)):
                at = self.random.randrange(len(graph.initializer) + 1)
                graph.initializer.insert(at, pieces.tensor(self.random, self.fresh("e")))
                if self.lists_all:
                    made = graph.initializer[at]
                    graph.input.append(helper.make_tensor_value_info(made.name, made.data_type, list(made.dims)))
        if self.use("sparse", 0.9):
            kind = None if self.use("elements") else TensorProto.FLOAT
            graph.sparse_initializer.append(pieces.sparse(self.random, self.fresh("s"), kind))
            if kind is not None:
                names.append(graph.sparse_initializer[0].values.name)
            if self.lists_all:
                name = graph.sparse_initializer[0].values.name
                graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE))
        return names

    def _decorate(self, graph: GraphProto, visible: list[str]) -> None:
        """What surrounds the nodes of a body: order, names, descriptions, annotations."""
        random = self.random
        if self.use("unsorted"):
            nodes = list(graph.node)
            random.shuffle(nodes)
            graph.ClearField("node")
            graph.node.extend(nodes)
        for number, node in enumerate(graph.node):
            if "names" not in self.features:
                node.name = f"node_{node.output[0]}"
            elif random.random() < 0.5:
                node.name = random.choice(("", "same", *(f"node {number} of {node.output[0]}",) * 6))
        if "value_infos" in self.features:
            for name in random.sample(visible, random.randrange(len(visible) + 1)):
                graph.value_info.append(
                    helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, random.choice((4, "M", None, -1))])
                )
            if random.random() < 0.5:
                graph.value_info.insert(0, pieces.value_info(random, self.fresh("nobody")))
        if "annotations" in self.features:
            for name in (random.choice(visible), "nobody"):
                entry = graph.quantization_annotation.add(tensor_name=name)
                entry.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=random.choice(visible))

    # nodes

    def step(self, graph: Any, visible: list[str], depth: int) -> list[str]:
        """Adds a node, or a few that belong together, to a graph or function; returns the tensors it made."""
        kinds = ["unary", "binary", "binary"]
        kinds += ["body"] * 2 * ("bodies" in self.features and depth < 3)
        kinds += [name for name in ("constants", "trailing", "attributes", "layers") if name in self.features]
        kinds += ["call"] * bool(self.functions)
        return list(getattr(self, f"add_{self.random.choice(kinds)}")(graph, visible, depth))

    def node(
        self, graph: Any, op: str, inputs: list[str], domain: str = "", outputs: int = 1, **settings: Any
    ) -> NodeProto:
        made: NodeProto = graph.node.add(op_type=op)
        made.input.extend(inputs)
        made.output.extend(self.fresh() for _ in range(outputs))
        if domain:
            made.domain = domain
        elif self.use("domains", 0.3):
            made.domain = self.random.choice(("", self.spelling))
        made.attribute.extend(helper.make_attribute(key, value) for key, value in settings.items())
        return made

    def add_unary(self, graph: Any, visible: list[str], _depth: int) -> Any:
        return self.node(graph, self.random.choice(UNARY), [self.random.choice(visible)]).output

    def add_binary(self, graph: Any, visible: list[str], _depth: int) -> Any:
        pair = [self.random.choice(visible), self.random.choice(visible)]
        return self.node(graph, self.random.choice(BINARY), pair).output

    def add_trailing(self, graph: Any, visible: list[str], _depth: int) -> Any:
        """Omitted inputs in the middle and at the end, omitted outputs at the end."""
        name = self.random.choice(visible)
        if self.random.random() < 0.5:
            return self.node(graph, "Clip", [name, "", ""][: self.random.randrange(1, 4)]).output
        dropout = self.node(graph, "Dropout", [name, "", ""][: 1 if self.opset < 12 else self.random.randrange(1, 4)])
        made = list(dropout.output)
        dropout.output.append("")
        return made

    def add_constants(self, graph: Any, _visible: list[str], _depth: int) -> Any:
        attribute = pieces.constant_attribute(self.random)
        if self.random.random() < 0.6:
            attribute = helper.make_attribute("value", pieces.tensor(self.random, "", TensorProto.FLOAT, SHAPE))
        made = self.node(graph, "Constant", [])
        made.attribute.append(attribute)
        return made.output if list(attribute.t.dims) == list(SHAPE) and attribute.t.data_type == 1 else []

    def add_attributes(self, graph: Any, visible: list[str], depth: int) -> Any:
        body = self.body(visible, depth + 1, [], 1) if depth < 2 else GraphProto(name="deep")
        made = self.node(
            graph, "Anything", [self.random.choice(visible), "", "undefined"][: self.random.randrange(4)], "custom"
        )
        made.attribute.extend(pieces.attributes(self.random, body))
        return made.output

    def add_call(self, graph: Any, visible: list[str], _depth: int) -> Any:
        function = self.random.choice(self.functions)
        made = self.node(graph, function.name, [self.random.choice(visible)], "local")
        if function.overload:
            made.overload = function.overload
        made.attribute.append(helper.make_attribute("alpha", 0.25))
        return made.output

    def add_layers(self, graph: Any, visible: list[str], _depth: int) -> Any:
        """Pad, Conv and BatchNormalization between two Reshapes, and a product, with constants given by nodes."""

        def const(values: Any, dtype: Any = np.float32) -> str:
            node = self.node(graph, "Constant", [])
            node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.asarray(values, dtype))))
            return str(node.output[0])

        rng = np.random.default_rng(self.random.randrange(4))
        image = self.node(graph, "Reshape", [self.random.choice(visible), const([1, 2, 2, 2], np.int64)]).output[0]
        if self.opset >= 11:
            image = self.node(graph, "Pad", [image, const([0, 0, 0, 0, 0, 0, 1, 1], np.int64)]).output[0]
            image = self.node(
                graph, "Conv", [image, const(rng.standard_normal((4, 2, 2, 2))), const(np.ones(4))]
            ).output[0]
        else:
            image = self.node(graph, "Conv", [image, const(rng.standard_normal((4, 2, 1, 1)))]).output[0]
        norm = [const(np.abs(rng.standard_normal(4)) + 0.5) for _ in range(4)]
        image = self.node(graph, "BatchNormalization", [image, *norm]).output[0]
        image = self.node(graph, "Relu", [image]).output[0]
        flat = self.node(graph, "Reshape", [image, const([2, 8], np.int64)]).output[0]
        return self.node(graph, "MatMul", [flat, const(rng.standard_normal((8, 4)))]).output

    def add_body(self, graph: Any, visible: list[str], depth: int) -> Any:
        return getattr(self, f"add_{self.random.choice(('if', 'loop', 'scan'))}")(graph, visible, depth + 1)

    def add_if(self, graph: Any, visible: list[str], depth: int) -> Any:
        condition = self._scalar(graph, True, TensorProto.BOOL)
        made = self.node(graph, "If", [condition])
        for branch in ("then_branch", "else_branch"):
            made.attribute.append(helper.make_attribute(branch, self.body(visible, depth, [], 1)))
        return made.output

    def add_loop(self, graph: Any, visible: list[str], depth: int) -> Any:
        trips = self._scalar(graph, 2, TensorProto.INT64)
        made = self.node(graph, "Loop", [trips, "", self.random.choice(visible)])
        step, again, carried = self.fresh("i"), self.fresh("c"), self.fresh()
        infos = [
            helper.make_tensor_value_info(step, TensorProto.INT64, []),
            helper.make_tensor_value_info(again, TensorProto.BOOL, []),
            helper.make_tensor_value_info(carried, TensorProto.FLOAT, SHAPE),
        ]
        body = self.body([*visible, carried], depth, infos, 1)
        body.output.insert(0, infos[1])
        made.attribute.append(helper.make_attribute("body", body))
        return made.output

    def add_scan(self, graph: Any, visible: list[str], depth: int) -> Any:
        made = self.node(graph, "Scan", [self.random.choice(visible), self.random.choice(visible)], outputs=2)
        state, row = self.fresh(), self.fresh("row")
        infos = [
            helper.make_tensor_value_info(state, TensorProto.FLOAT, SHAPE),
            helper.make_tensor_value_info(row, TensorProto.FLOAT, [4]),
        ]
        body = self.body([*visible, state], depth, infos, 1)
        # given out as it came, onnxruntime would leave it undefined
        copied = self.node(body, "Identity", [row])
        copied.name = copied.output[0]
        body.output.append(helper.make_tensor_value_info(copied.output[0], TensorProto.FLOAT, [4]))
        made.attribute.append(helper.make_attribute("body", body))
        made.attribute.append(helper.make_attribute("num_scan_inputs", 1))
        return made.output

    def _scalar(self, graph: Any, value: Any, kind: int) -> str:
        made = self.node(graph, "Constant", [])
        made.attribute.append(helper.make_attribute("value", helper.make_tensor("", kind, [], [value])))
        return str(made.output[0])

    def body(self, visible: list[str], depth: int, inputs: list[Any], outputs: int) -> GraphProto:
        """The graph of an attribute. With the feature "names" its tensors are called like those of its siblings."""
        graph = GraphProto(name="" if self.use("names", 0.1) else "body")
        graph.input.extend(inputs)
        seen = list(visible)
        for _ in range(0 if self.lists_all else self.random.randrange(3)):
            name = self.fresh("w")
            graph.initializer.append(pieces.tensor(self.random, name, TensorProto.FLOAT, SHAPE))
            seen.append(name)
        made: list[str] = []
        for _ in range(self.random.randrange(1, 4)):
            made += self.step(graph, seen + made, depth)
        made += self.add_unary(graph, seen + made, depth)
        for name in made[-outputs:]:
            graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE))
        if self.use("names", 0.7):
            rename(graph, {name: f"same{number}" for number, name in enumerate(made) if name not in visible}, depth)
            made = [info.name for info in graph.output]
        self._decorate(graph, [info.name for info in graph.output])
        return graph

    def function(self, name: str, overload: str) -> FunctionProto:
        """A local function of one input with constants, a reference to an attribute and an attribute with a default."""
        proto = FunctionProto(name=name, domain="local", input=["x"], attribute=["alpha"])
        if overload:
            proto.overload = overload
        functions, self.functions = self.functions, []
        visible = ["x"]
        for _ in range(self.random.randrange(1, 4)):
            visible += self.step(proto, visible, 2)
        self.functions = functions
        leaky = self.node(proto, "LeakyRelu", [self.random.choice(visible)])
        leaky.attribute.append(AttributeProto(name="alpha", type=AttributeProto.FLOAT, ref_attr_name="alpha"))
        proto.output.append(leaky.output[0])
        proto.opset_import.append(
            helper.make_opsetid(self.spelling if self.random.random() < 0.9 else "ai.onnx", self.opset)
        )
        proto.opset_import.append(helper.make_opsetid("custom", 3))
        if self.ir >= 9:
            proto.attribute_proto.append(helper.make_attribute("beta", [1.0, 2.0]))
        if self.use("value_infos") and self.ir >= 10:
            proto.value_info.append(helper.make_tensor_value_info(leaky.output[0], TensorProto.FLOAT, None))
            proto.value_info.append(pieces.value_info(self.random, "nobody"))
        return proto


def rename(graph: GraphProto, names: dict[str, str], depth: int) -> None:
    """Rename tensors in a body and the bodies within; `depth` keeps the names of nested bodies apart."""
    names = {old: f"{new}_{depth}" for old, new in names.items()}
    for inner in (graph, *(body for body in walk(graph) if isinstance(body, GraphProto))):
        for node in inner.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
        for infos in (inner.output, inner.value_info):
            for info in infos:
                info.name = names.get(info.name, info.name)


def walk(message: Message) -> Iterator[Message]:
    """The message and every message within, outer first."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for inner in value if field.is_repeated else (value,):
            yield from walk(inner)


@st.composite
def models(draw: Any, features: tuple[str, ...] = FEATURES) -> ModelProto:
    """Models that use any of the features. Hypothesis shrinks to the fewest that still fail."""
    chosen = draw(st.sets(st.sampled_from(features), max_size=len(features)))
    return Maker(draw(st.integers(0, 2**32)), chosen).model()
