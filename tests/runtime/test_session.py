from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, parser

from onnxopt.errors import ModelError, PassError, UsageError
from onnxopt.model import load
from onnxopt.runtime import Session
from onnxopt.runtime.ports import dtype_of
from onnxopt.runtime.session import _options
from tests.runtime.builders import build, build_bytes

ADD = build_bytes("add (float[N,2] x, float[1,2] y) => (float[N,2] z) { z = Add(x, y) }")
X = np.arange(4, dtype=np.float32).reshape(2, 2)


def test_runs_bytes_and_path_alike(tmp_path: Path) -> None:
    path = tmp_path / "add.onnx"
    path.write_bytes(ADD)
    for source in (ADD, path, str(path)):
        outputs = Session(source).run({"x": X, "y": X[:1]})
        assert list(outputs) == ["z"]
        np.testing.assert_array_equal(outputs["z"], X + X[:1])


def test_ports_name_type_and_dims() -> None:
    session = Session(ADD)
    assert [str(item) for item in session.inputs] == ["x: float32[N,2]", "y: float32[1,2]"]
    assert session.inputs[0].shape == ("N", 2)
    assert session.outputs[0].dtype == np.float32
    assert session.optional_inputs == []


def test_only_the_wanted_outputs_come_back() -> None:
    model = build_bytes("two (float[2] x) => (float[2] a, float[2] b) { a = Neg(x)\n b = Abs(x) }")
    outputs = Session(model).run({"x": np.array([1, -2], np.float32)}, ["b"])
    assert list(outputs) == ["b"]
    np.testing.assert_array_equal(outputs["b"], [1, 2])


def test_overridable_initializers_are_optional_inputs() -> None:
    model = build("f (float[2] x, float[2] w) => (float[2] y) { y = Add(x, w) }")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float32), "w"))
    session = Session(model.SerializeToString())
    assert [item.name for item in session.inputs] == ["x"]
    assert [(item.name, item.required) for item in session.optional_inputs] == [("w", False)]
    x = np.zeros(2, np.float32)
    np.testing.assert_array_equal(session.run({"x": x})["y"], [1, 1])
    np.testing.assert_array_equal(session.run({"x": x, "w": x + 3})["y"], [3, 3])


@pytest.mark.parametrize("optimize", [True, False])
def test_optimize_decides_whether_nodes_are_fused(optimize: bool, tmp_path: Path) -> None:
    target = tmp_path / "optimized.onnx"
    model = build_bytes("f (float[2] x) => (float[2] y) { a = Identity(x)\n b = Identity(a)\n y = Neg(b) }")
    Session(model, optimize=optimize, optimized_path=target)
    assert len(onnx.load(target).graph.node) == (1 if optimize else 3)


def test_options_are_sequential_and_say_the_threads() -> None:
    options = _options(optimize=True, threads=3, optimized_path=None)
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert str(options.execution_mode).endswith("ORT_SEQUENTIAL")


def test_zero_threads_are_refused() -> None:
    with pytest.raises(UsageError, match="0 threads"):
        Session(ADD, threads=0)


def test_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.onnx: no such file"):
        Session(tmp_path / "absent.onnx")


def custom_domain() -> bytes:
    text = '<ir_version: 10, opset_import: ["" : 21, "my.dom": 1]> f (float[2] x) => (float[2] y) { y = my.dom.Foo(x) }'
    serialized: bytes = parser.parse_model(text).SerializeToString()
    return serialized


def with_name(text: str, name: str) -> bytes:
    model = build(text)
    model.graph.node[0].name = name
    serialized: bytes = model.SerializeToString()
    return serialized


@pytest.mark.parametrize(
    ("model", "cause", "remedy"),
    [
        (b"garbage" * 9, "protobuf parsing failed", "no ONNX model"),
        (b"", "No graph was found", "no ONNX model"),
        (build_bytes("f (float[2] x) => (float[2] y) { y = Foo(x) }"), "No Op registered for Foo", "custom operator"),
        (custom_domain(), "my.dom:Foo", "custom operator"),
        (build_bytes("f (float[2] x) => (float[2] y) { y = Neg(x) }", opset=99), "Opset 99", "older opset"),
        (
            with_name("f (float[2,3] x) => (float[2,2] y) { y = MatMul(x, x) }", "scores"),
            "at node 'scores'",
            "contradicts itself",
        ),
        (
            with_name("f (bfloat16[1,1,2,2] x) => (bfloat16[1,1,1,1] y) { y = Conv(x, x) }", "stem"),
            "at node 'stem'",
            "contradicts itself",
        ),
    ],
)
def test_load_errors_are_one_line_with_a_fitting_remedy(model: bytes, cause: str, remedy: str) -> None:
    with pytest.raises(ModelError) as caught:
        Session(model)
    assert cause in caught.value.cause
    assert remedy in caught.value.remedy
    assert "\n" not in caught.value.cause
    assert "ONNXRuntimeError" not in caught.value.cause
    assert "/onnxruntime_src" not in caught.value.cause


@pytest.mark.parametrize(
    ("inputs", "cause"),
    [
        ({"x": X, "y": X[:1].astype(np.float64)}, "input 'y': expected float32, got float64"),
        ({"x": X[0], "y": X[:1]}, r"input 'x': expected rank 2 \[N,2\], got rank 1 \[2\]"),
        ({"x": X, "y": X}, r"input 'y': expected 1 at axis 0 of \[1,2\], got 2"),
        ({"x": X}, "input 'y' is missing"),
        ({"x": X, "y": X[:1], "yy": X}, "no input 'yy'"),
    ],
)
def test_run_errors_name_the_input(inputs: dict[str, Any], cause: str) -> None:
    with pytest.raises(PassError, match=cause):
        Session(ADD).run(inputs)


def test_run_errors_name_the_node() -> None:
    model = with_name("f (float[A,B] x) => (float[C,D] y) { y = MatMul(x, x) }", "scores")
    with pytest.raises(PassError, match=r"at node 'scores'.*x float32"):
        Session(model).run({"x": np.zeros((2, 3), np.float32)})


def test_unknown_output_is_named() -> None:
    with pytest.raises(PassError, match="no output 'zz'"):
        Session(ADD).run({"x": X, "y": X[:1]}, ["zz"])


def test_failures_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model = build_bytes("f (float[A,B] x) => (float[C,D] y) { y = MatMul(x, x) }")
    with pytest.raises(PassError):
        Session(model).run({"x": np.zeros((2, 3), np.float32)})
    assert capfd.readouterr() == ("", "")


def test_sequences_optionals_and_strings_pass_through() -> None:
    sequence = Session(build_bytes("f (seq(float[N]) x) => (seq(float[N]) y) { y = Identity(x) }"))
    assert (sequence.inputs[0].kind, sequence.inputs[0].shape, sequence.inputs[0].dtype) == (
        "sequence",
        None,
        np.dtype(np.float32),
    )
    parts = [np.zeros(1, np.float32), np.ones(3, np.float32)]
    for got, expected in zip(sequence.run({"x": parts})["y"], parts, strict=True):
        np.testing.assert_array_equal(got, expected)
    optional = Session(build_bytes("f (optional(float[N]) x) => (optional(float[N]) y) { y = Identity(x) }"))
    assert (optional.inputs[0].kind, optional.inputs[0].required) == ("optional", False)
    assert optional.run({"x": None})["y"] is None
    strings = Session(build_bytes("f (string[N] x) => (string[N] y) { y = Identity(x) }"))
    assert strings.run({"x": np.array(["a", "bé"])})["y"].tolist() == ["a", "bé"]


@pytest.mark.parametrize(("name", "code"), [("bfloat16", 16), ("float8e4m3fn", 17), ("float8e5m2", 19)])
def test_types_that_numpy_lacks_go_in_and_out(name: str, code: int) -> None:
    dtype = dtype_of(f"tensor({name})")
    assert dtype is not None
    values = np.array([[0.5, -2, 3], [0, 1, -0.0]]).astype(dtype)
    model = build_bytes(f"f ({name}[2,3] x) => ({name}[2,3] y, float[2,3] z) {{ y = Identity(x)\n z = Cast<to=1>(x) }}")
    outputs = Session(model).run({"x": values})
    assert outputs["y"].dtype == dtype
    np.testing.assert_array_equal(outputs["y"].view(np.uint8), values.view(np.uint8))
    np.testing.assert_array_equal(outputs["z"], values.astype(np.float32))
    assert code


@pytest.mark.parametrize(("name", "code", "values"), [("int4", 22, [-8, -1, 0, 7, 3]), ("uint4", 21, [0, 15, 8, 7, 3])])
def test_packed_types_are_unpacked(name: str, code: int, values: list[int]) -> None:
    model = build_bytes(f"f (float[5] x) => ({name}[5] y) {{ y = Cast<to={code}>(x) }}")
    outputs = Session(model, optimize=False).run({"x": np.array(values, np.float32)})
    assert outputs["y"].dtype == np.dtype(getattr(ml_dtypes, name))
    assert outputs["y"].astype(int).tolist() == values


@pytest.mark.parametrize(
    "weights",
    [
        np.arange(1024, dtype=np.float32),
        np.arange(1024).astype(ml_dtypes.bfloat16),
        (np.arange(4097) % 16 - 8).astype(ml_dtypes.int4),
        (np.arange(4097) % 16).astype(ml_dtypes.uint4),
        np.arange(4096) % 2 == 0,
    ],
    ids=lambda array: str(array.dtype),
)
def test_a_model_hands_its_weights_over(weights: NDArray[Any]) -> None:
    models = pytest.importorskip("onnxopt.model")
    proto = build(f"f (float[{weights.size}] x) => (float[{weights.size}] y) {{ c = Cast<to=1>(w)\n y = Add(x, c) }}")
    proto.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    session = Session(models.load(proto))
    x = np.full(weights.size, 0.5, np.float32)
    np.testing.assert_array_equal(session.run({"x": x})["y"], weights.astype(np.float32) + x)


def test_a_large_initializer_that_nobody_reads_is_no_obstacle() -> None:
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 32])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 32])],
            [numpy_helper.from_array(np.eye(32, dtype=np.float32), name) for name in ("w", "idle")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    x = np.arange(32, dtype=np.float32)[None]
    assert np.array_equal(Session(load(proto)).run({"x": x})["y"], x)


def test_a_large_initializer_that_is_listed_as_an_input_and_read_by_nobody_need_not_be_given() -> None:
    """Before IR 4 every initializer is listed; the runtime asked for those whose values were left out."""
    listed = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [32, 32]) for name in ("w", "idle")]
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 32]), *listed],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 32])],
            [numpy_helper.from_array(np.eye(32, dtype=np.float32), name) for name in ("w", "idle")],
        ),
        opset_imports=[helper.make_opsetid("", 9)],
        ir_version=3,
    )
    session = Session(load(proto))
    x = np.arange(32, dtype=np.float32)[None]
    assert [port.name for port in session.inputs] == ["x"]
    assert np.array_equal(session.run({"x": x})["y"], x)


def test_values_in_files_are_mapped_not_copied(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    source = build("g (float[1,64] x) => (float[1,64] y) { t = MatMul(x, w) y = Add(t, b) }")
    source.graph.initializer.extend(
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(weights[:16].reshape(1, 1024), "u")]
    )
    source.graph.initializer.append(numpy_helper.from_array(np.ones((1, 64), np.float32), "b"))
    source.graph.node.insert(0, helper.make_node("Identity", ["u"], ["unused"]))
    path = tmp_path / "net.onnx"
    inputs = {"x": np.ones((1, 64), np.float32)}
    expected = Session(load(source), optimize=False).run(inputs)["y"]
    load(source).save(path, external_data="always")
    model = load(path)
    session = Session(model, optimize=False)
    assert session._kept[0] == {}  # nothing had to be handed over
    assert np.array_equal(session.run(inputs)["y"], expected)
    model.graph.nodes[1].inputs[1].values = weights * 2
    changed = Session(model, optimize=False)
    assert list(changed._kept[0]) == ["w"]
    assert np.allclose(changed.run(inputs)["y"], (expected - 1) * 2 + 1, atol=1e-4)


def test_a_file_that_was_replaced_is_not_mapped(tmp_path: Path) -> None:
    weights = np.arange(512, dtype=np.float32)
    source = build("g (float[512] x) => (float[512] y) { y = Add(x, w) }")
    source.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    load(source).save(tmp_path / "net.onnx", external_data="always")
    model = load(tmp_path / "net.onnx")
    (sidecar,) = tmp_path.glob("*.onnxdata")
    (tmp_path / "other").write_bytes(bytes(2048))
    (tmp_path / "other").replace(sidecar)
    session = Session(model, optimize=False)
    assert list(session._kept[0]) == ["w"]
    assert np.array_equal(session.run({"x": np.zeros(512, np.float32)})["y"], weights)
