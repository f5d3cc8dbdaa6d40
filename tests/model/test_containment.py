"""Values in other files: refused in every place where a tensor may hide, unless the place is a weight's and the file
lies in the model's folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from onnxopt.errors import ModelError
from onnxopt.model import load

WEIGHTS = np.arange(4, dtype=np.float32)
INDICES = np.arange(4, dtype=np.int64)
Place = Callable[[dict[str, str]], ModelProto]

# what the external data entries may say; {folder} is the model's folder
HOSTILE: dict[str, dict[str, str]] = {
    "parent": {"location": "../outside.bin"},
    "parent within": {"location": "sub/../../outside.bin"},
    "absolute": {"location": "{folder}/weights.bin"},
    "link": {"location": "link.bin"},
    "linked folder": {"location": "linked/outside.bin"},
    "hard link": {"location": "hard.bin"},
    "empty": {"location": ""},
    "dot": {"location": "."},
    "backslash": {"location": "..\\outside.bin"},
    "drive": {"location": "C:weights.bin"},
    "folder": {"location": "sub"},
    "device": {"location": "/dev/zero"},
    "pipe": {"location": "pipe"},
    "missing": {"location": "gone.bin"},
    "nul": {"location": "weights.bin\0.txt"},
    "too long": {"location": "w" * 5000},
    "unknown key": {"location": "weights.bin", "command": "x"},
    "negative offset": {"location": "weights.bin", "offset": "-4"},
    "huge offset": {"location": "weights.bin", "offset": str(1 << 63)},
    "offset in words": {"location": "weights.bin", "offset": "four"},
    "negative length": {"location": "weights.bin", "length": "-16"},
    "huge length": {"location": "weights.bin", "length": str(1 << 70)},
    "other length": {"location": "weights.bin", "length": "8"},
}


def external(entries: dict[str, str], name: str = "w", like: np.ndarray = WEIGHTS) -> TensorProto:
    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(like.dtype), dims=like.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(*nodes: NodeProto, **parts: object) -> ModelProto:
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    functions = parts.pop("functions", [])
    x = helper.make_tensor_value_info("x", TensorProto.BOOL, [])
    graph = helper.make_graph(list(nodes), "g", [x], [y], **parts)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, functions=functions)


IDENTITY = helper.make_node("Identity", ["w"], ["y"])


def body(*nodes: NodeProto, **parts: object) -> GraphProto:
    return helper.make_graph(
        list(nodes), "body", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], **parts
    )


def branches(inner: GraphProto) -> ModelProto:
    return model(helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner))


def function(*nodes: NodeProto) -> ModelProto:
    made = helper.make_function("d", "f", [], ["y"], list(nodes), [helper.make_opsetid("", 17)])
    return model(helper.make_node("f", [], ["y"], domain="d"), functions=[made])


def constant(entries: dict[str, str]) -> NodeProto:
    return helper.make_node("Constant", [], ["y"], value=external(entries))


def sparse(values: TensorProto | None = None, indices: TensorProto | None = None) -> SparseTensorProto:
    return SparseTensorProto(
        values=values or numpy_helper.from_array(WEIGHTS, "w"),
        indices=indices or numpy_helper.from_array(INDICES),
        dims=[8],
    )


def custom(kind: int, **content: object) -> NodeProto:
    node = helper.make_node("Own", [], ["y"], domain="d")
    node.attribute.append(AttributeProto(name="a", type=kind, **content))
    return node


def training(entries: dict[str, str]) -> ModelProto:
    made = model(IDENTITY, initializer=[numpy_helper.from_array(WEIGHTS, "w")])
    made.training_info.add().algorithm.initializer.append(external(entries))
    return made


# places that external data is read from
WEIGHT_PLACES: dict[str, Place] = {
    "initializer": lambda e: model(IDENTITY, initializer=[external(e)]),
    "initializer of a body": lambda e: branches(body(IDENTITY, initializer=[external(e)])),
    "Constant": lambda e: model(constant(e)),
    "Constant of a body": lambda e: branches(body(constant(e))),
    "Constant of a function": lambda e: function(constant(e)),
}
# places where nobody may keep values in other files
OTHER_PLACES: dict[str, Place] = {
    "sparse values": lambda e: model(IDENTITY, sparse_initializer=[sparse(values=external(e))]),
    "sparse indices": lambda e: model(IDENTITY, sparse_initializer=[sparse(indices=external(e, "", INDICES))]),
    "Constant sparse_value": lambda e: model(
        helper.make_node("Constant", [], ["y"], sparse_value=sparse(values=external(e)))
    ),
    "tensor attribute": lambda e: model(custom(AttributeProto.TENSOR, t=external(e))),
    "tensors attribute": lambda e: model(custom(AttributeProto.TENSORS, tensors=[external(e)])),
    "sparse attribute": lambda e: model(custom(AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse(values=external(e)))),
    "sparse list attribute": lambda e: model(
        custom(AttributeProto.SPARSE_TENSORS, sparse_tensors=[sparse(indices=external(e, "", INDICES))])
    ),
    "attribute that says int": lambda e: model(custom(AttributeProto.INT, t=external(e))),
    "attribute in a body": lambda e: branches(body(custom(AttributeProto.TENSOR, t=external(e)))),
    "attribute in a function": lambda e: function(custom(AttributeProto.TENSOR, t=external(e))),
    "Constant with inputs": lambda e: model(helper.make_node("Constant", ["x"], ["y"], value=external(e))),
    "training": training,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("top")
    inside = top / "model"
    (inside / "sub").mkdir(parents=True)
    (top / "outside.bin").write_bytes(WEIGHTS.tobytes())
    (inside / "weights.bin").write_bytes(WEIGHTS.tobytes())
    (inside / "link.bin").symlink_to(top / "outside.bin")
    (inside / "linked").symlink_to(top)
    os.link(top / "outside.bin", inside / "hard.bin")
    os.mkfifo(inside / "pipe")
    return inside


def save(folder: Path, place: Place, entries: dict[str, str]) -> Path:
    path = folder / "model.onnx"
    made = place({key: value.replace("{folder}", str(folder)) for key, value in entries.items()})
    path.write_bytes(made.SerializeToString())
    return path


@pytest.mark.parametrize("entries", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("place", [*WEIGHT_PLACES.values(), *OTHER_PLACES.values()], ids=WEIGHT_PLACES | OTHER_PLACES)
def test_no_place_reads_what_it_must_not(folder: Path, place: Place, entries: dict[str, str]) -> None:
    path = save(folder, place, entries)
    started = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        load(path)
    assert time.perf_counter() - started < 1
    assert str(path) in caught.value.cause


@pytest.mark.parametrize("place", WEIGHT_PLACES.values(), ids=WEIGHT_PLACES)
def test_weights_are_read_from_the_folder(folder: Path, place: Place) -> None:
    path = save(folder, place, {"location": "weights.bin", "offset": "0", "length": "16"})
    constants = [item for item in load(path).constants() if item.dtype == np.float32]
    assert constants
    assert all(np.array_equal(item.values, WEIGHTS) for item in constants)


@pytest.mark.parametrize("place", OTHER_PLACES.values(), ids=OTHER_PLACES)
def test_other_places_keep_their_values_in_the_model(folder: Path, place: Place) -> None:
    path = save(folder, place, {"location": "weights.bin"})
    with pytest.raises(ModelError, match="another file"):
        load(path)


def test_a_pipe_or_device_is_no_model(folder: Path) -> None:
    from onnxopt.errors import UsageError

    for path in (folder / "pipe", Path("/dev/zero")):
        with pytest.raises(UsageError, match="no regular file"):
            load(path)


def test_the_fixture_is_what_onnx_reads(folder: Path) -> None:
    """The control: the same reference is good where it may stand."""
    path = save(folder, WEIGHT_PLACES["initializer"], {"location": "weights.bin"})
    assert np.array_equal(numpy_helper.to_array(onnx.load(path).graph.initializer[0]), WEIGHTS)
