"""Every operator between two dense layers: channels are made along an axis of its input, read along one of its output.

    python -m tests.conformance.sandwich [--every N]

Whatever an axis rule lets go is cut and compared with the model in which it is silent. That holds the rules against all
the attributes and opset versions of onnx's own tests of operators.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxopt.graph.axes.maps import Split
from onnxopt.model import load
from tests.conformance.corpus import Case, cases
from tests.graph.oracle import cut, float_elements, maps_of, silenced, some_sets
from tests.helpers import run

SPLITS: tuple[Split, ...] = ("fewest", "outer", "inner")
# the most elements of a tensor that is worth the time
_LARGEST = 20_000


def sandwiches(case: Case) -> Iterator[tuple[str, ModelProto, dict[str, Any]]]:
    """(name, model, inputs) for every axis of the first input and of the first output."""
    graph = case.model.graph
    values = case.inputs or {}
    first = graph.input[0].name if graph.input else ""
    data, result = values.get(first), next(iter(case.golden or ()), None)
    if not isinstance(data, np.ndarray) or data.dtype != np.float32 or not isinstance(result, np.ndarray):
        return
    rest = {name: value for name, value in values.items() if name != first}
    if not all(isinstance(value, np.ndarray) for value in rest.values()) or len(graph.input) != len(values):
        return
    if not all(1 < array.ndim < 6 and 0 < array.size < _LARGEST for array in (data, result)):
        return
    for before in range(data.ndim):
        for after in range(result.ndim):
            if data.shape[before] > 1 and result.shape[after] > 1 and result.dtype.kind in "fiub":
                model = _sandwich(case, rest, before, after)
                yield f"{case.name} {before} {after}", model, {"sandwich_x": data}


def _sandwich(case: Case, rest: dict[str, Any], before: int, after: int) -> ModelProto:
    graph = case.model.graph
    data, result = (case.inputs or {})[graph.input[0].name], (case.golden or ())[0]
    rng = np.random.default_rng(before * 8 + after)
    model = ModelProto()
    model.CopyFrom(case.model)
    made = model.graph
    nodes = list(made.node)
    made.ClearField("node")
    made.node.extend(_dense("in", "sandwich_x", graph.input[0].name, data.ndim, before))
    made.node.extend(nodes)
    made.node.append(helper.make_node("Cast", [graph.output[0].name], ["sandwich_cast"], to=TensorProto.FLOAT))
    made.node.extend(_dense("out", "sandwich_cast", "sandwich_y", result.ndim, after))
    weights = {
        "in": np.eye(data.shape[before]) + 0.2 * rng.random((data.shape[before],) * 2),
        "out": rng.random((result.shape[after], 3)),
    }
    for name, value in weights.items():
        made.initializer.append(numpy_helper.from_array(value.astype(np.float32), f"sandwich_{name}"))
    for name, value in rest.items():
        made.initializer.append(numpy_helper.from_array(value, name))
    made.ClearField("input")
    made.ClearField("output")
    made.input.append(helper.make_tensor_value_info("sandwich_x", TensorProto.FLOAT, data.shape))
    made.output.append(helper.make_tensor_value_info("sandwich_y", TensorProto.FLOAT, None))
    model.ir_version = max(model.ir_version, 4)
    return model


def _dense(name: str, x: str, y: str, rank: int, axis: int) -> list[Any]:
    """A matrix product over one axis."""
    perm = [*(at for at in range(rank) if at != axis), axis]
    return [
        helper.make_node("Transpose", [x], [f"sandwich_{name}_last"], perm=perm),
        helper.make_node("MatMul", [f"sandwich_{name}_last", f"sandwich_{name}"], [f"sandwich_{name}_product"]),
        helper.make_node("Transpose", [f"sandwich_{name}_product"], [y], perm=np.argsort(perm).tolist()),
    ]


def judge(model: ModelProto, inputs: dict[str, Any], split: Split) -> str:
    """What became of a random half of the free sets: "kept", "cut", "unjudged", or the fault in words."""
    chosen = some_sets(maps_of(load(model), split), 0.5, 0)
    if not chosen:
        return "kept"
    small, size = cut(model, chosen, split)
    try:
        expected = run(silenced(model, chosen, split), inputs)["sandwich_y"]
    except Exception:  # noqa: BLE001  an operator that the runtime lacks
        return "unjudged"
    if not np.isfinite(expected).all():
        return "unjudged"
    found = run(small, inputs)["sandwich_y"]
    if float_elements(small) != size:
        return f"{float_elements(small)} elements, predicted {size}"
    if found.shape != expected.shape:
        return f"shape {found.shape} for {expected.shape}"
    difference = float(np.abs(found - expected).max(initial=0)) / max(float(np.abs(expected).max(initial=0)), 1e-6)
    return "cut" if difference < 1e-4 else f"difference {difference:.1e}"


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.sandwich")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="which operators were cut and which kept")
    options = parser.parse_args(arguments)
    tally: Counter[str] = Counter()
    operators: dict[str, Counter[str]] = {}
    for name, model, inputs in every_nth(options.every):
        for split in SPLITS:
            try:
                verdict = judge(model, inputs, split)
            except Exception as error:  # noqa: BLE001  whatever it is, it is a fault
                verdict = f"crashed: {error!r}"[:300]
            known = verdict in ("kept", "cut", "unjudged")
            tally[verdict if known else "faults"] += 1
            kind = next((node.op_type for node in model.graph.node[3:]), "")
            operators.setdefault(kind, Counter())[verdict if known else "faults"] += 1
            if not known:
                print(f"{name} {split}: {verdict}", flush=True)
    if options.verbose:
        for kind, counter in sorted(operators.items()):
            print(f"{kind:30} {dict(counter)}")
    print(dict(tally))
    return int(tally["faults"] > 0)


def every_nth(every: int) -> Iterator[tuple[str, ModelProto, dict[str, Any]]]:
    """The sandwiches of every Nth case."""
    for case in cases()[::every]:
        yield from sandwiches(case)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
