"""Is a model that passes left alone written as it was read?

    python -m benchmarks.roundtrip [FILE_OR_FOLDER ...] [--every N]

For every model file given, and for every N-th of the models that the installed onnx package tests backends with, an
Identity is put on every output of every body, the model is exported, the Identities are removed and the model is
exported again. Prints how many files came out different from what went in (0 is the only good answer).
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import ModelProto

from onnxopt.graph import remove_node
from onnxopt.model import Graph, Model, Node, Variable, load


def backend_models(every: int) -> Iterator[tuple[str, ModelProto]]:
    """(name, model) of every N-th backend test: the generated node cases and the stored files."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = [(case.name, case.model) for case in collect_testcases("") if case.model is not None]
    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    cases += [(str(path.relative_to(data)), path) for path in sorted(data.rglob("*.onnx"))]
    for name, model in cases[::every]:
        yield name, onnx.load(model, load_external_data=False) if isinstance(model, Path) else model


def insert_and_remove(model: Model) -> int:
    """Put an Identity on every body output, export, take them out again; returns how many."""
    added: list[tuple[Graph, int, Node]] = []
    for body in list(model.bodies()):
        for index, tensor in enumerate(body.outputs):
            node = Node("Identity", "", inputs=[tensor], outputs=[Variable(f"roundtrip_{len(added)}")])
            body.nodes.append(node)
            body.outputs[index] = node.outputs[0]
            added.append((body, index, node))
    model.to_proto()
    for body, index, node in reversed(added):
        body.outputs[index] = node.inputs[0]
        remove_node(node, body)
    return len(added)


def differs(proto: ModelProto) -> bool:
    """Whether the round trip changes a single byte of the model."""
    before = proto.SerializeToString()
    model = load(proto)
    insert_and_remove(model)
    return bool(model.to_proto().SerializeToString() != before or proto.SerializeToString() != before)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--every", type=int, default=1, help="take every N-th backend model; 0: none")
    arguments = parser.parse_args()
    files = [p for path in arguments.paths for p in (sorted(path.rglob("*.onnx")) if path.is_dir() else [path])]
    start, count, bad = time.perf_counter(), 0, 0
    pairs = ((str(path), onnx.load(path, load_external_data=False)) for path in files)
    for source in (pairs, backend_models(arguments.every) if arguments.every else ()):
        for name, proto in source:
            count += 1
            if differs(proto):
                bad += 1
                print(f"differs: {name}")
    print(f"{count} models, {bad} differ, {time.perf_counter() - start:.1f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
