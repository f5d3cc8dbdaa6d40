from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import onnxopt
from onnxopt.inspection.inspect import inspect_model
from onnxopt.inspection.rank import rank_at
from onnxopt.inspection.record import Estimate, Inspection, TensorFacts
from onnxopt.inspection.weights import look_at
from onnxopt.model import load
from onnxopt.report import inspection_view
from tests.helpers import proto, with_weights
from tests.inspection.models import everything, normal, wasteful


def wins(found: Inspection) -> dict[str, Estimate]:
    return {each.kind: each for each in found.estimates}


def test_what_passes_could_win_is_what_they_win() -> None:
    found = wins(inspect_model(load(wasteful())))
    assert (found["duplicates"].count, found["duplicates"].bytes) == (1, 64 * 64 * 4)
    assert found["duplicates"].pass_name == "dedup"
    assert found["foldable"].count == 2
    assert found["channels"].pass_name == "prune"
    assert found["channels"].count == 8
    assert found["identities"].count == 1
    assert (found["unused"].count, found["unused"].bytes) == (1, 40)
    assert (found["palette"].count, found["palette"].bytes) == (2, 2 * (4096 * 4 - 4096 * 2 // 8 - 16))
    assert found["low_rank"].count == 2  # the zero filters leave half of the rank of `conv`
    assert found["low_rank"].bytes == (16 * 64 - 2 * (16 + 64) + 16 * 27 - 8 * (16 + 27)) * 4
    assert found["zeros"].count == 8 * 27 + 16
    assert found["zeros"].bytes == 16 * 27 * 4 - 16 * 27 // 8 - 8 * 27 * 4
    assert found["int8"].bytes is not None
    assert all(not each.sample for each in found.values())


def test_the_estimate_of_prune_and_dedup_is_met_by_a_run() -> None:
    source = wasteful()
    found = wins(inspect_model(load(source)))
    for name, kind in (("dedup", "duplicates"), ("prune", "channels")):
        report = onnxopt.optimize(source, name, latency_seconds=0).report
        record = report.passes[-1]
        assert sum(change.count for change in record.changes) == found[kind].count


def test_nothing_changes_and_facts_are_right(tmp_path: Path) -> None:
    source = wasteful()
    model = load(source)
    raw = model.to_proto().SerializeToString()
    found = inspect_model(model)
    assert model.to_proto().SerializeToString() == raw
    assert (found.nodes, found.bodies, found.functions) == (14, 0, 0)
    assert found.operators["MatMul"] == 4
    assert found.inputs == (TensorFacts("x", "float32", (1, 3, 8, 8)),)
    assert found.macs.known == 16 * 27 * 64 + 16 * 64 + 64 * 64 * 2 + 64 * 6
    assert found.file_bytes == len(raw)
    assert found.largest[0].bytes == 64 * 64 * 4
    assert found.largest[0].distinct == 4
    assert found.weight_bytes == model.nbytes()


def test_bodies_functions_sparse_weights_strings_and_defaults() -> None:
    found = onnxopt.inspect(everything())
    assert (found.bodies, found.functions) == (3, 1)
    assert found.operators == {
        "Add": 2, "Identity": 2, "Abs": 1, "If": 1, "Loop": 1, "MatMul": 1, "Neg": 1, "Relu": 1, "SequenceConstruct": 1,
        "my.twice": 1,
    }  # fmt: skip
    assert found.nodes == sum(found.operators.values())
    assert {row.dtype for row in found.element_types} == {"float32", "string", "float32, sparse"}
    assert [(end.name, end.dtype, end.default) for end in found.inputs] == [
        ("c", "bool", False),
        ("x", "float32", False),
        ("n", "int64", False),
        ("d", "float32", True),
    ]
    assert [end.dtype for end in found.outputs] == ["float32", "string", "sequence_type"]
    assert found.metadata == {"author": "me"}
    assert found.producer == "tests 1.0"
    assert found.opsets == {"": 17, "my": 1}
    assert len(found.notes) == 2
    assert "10, those of 3 bodies and 1 function among them" not in found.to_text()
    assert "12, those of 3 bodies and 1 function among them" in found.to_text()


def test_open_lengths_leave_macs_unknown_but_told_for_one() -> None:
    source = with_weights(proto("agraph (float[N,S,8] x) => (float[N,S,4] y) { y = MatMul(x, w) }"), w=normal(8, 4))
    macs = inspect_model(load(source)).macs
    assert (macs.known, macs.unknown, macs.with_ones, macs.open_lengths) == (0, 1, 32, ("N", "S"))
    assert "32 where N, S = 1; else unknown" in inspect_model(load(source)).to_text()


def test_sidecars_and_what_nothing_reads_of_them(tmp_path: Path) -> None:
    source = with_weights(proto("agraph (float[2,64] x) => (float[2,64] y) { y = MatMul(x, w) }"), w=normal(64, 64))
    onnx.save(source, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    with (tmp_path / "m.data").open("ab") as file:
        file.write(bytes(1000))
    found = onnxopt.inspect(tmp_path / "m.onnx")
    [sidecar] = found.sidecars
    assert (sidecar.name, sidecar.bytes, sidecar.orphan_bytes) == ("m.data", 64 * 64 * 4 + 1000, 1000)
    assert found.file_bytes == sum((tmp_path / name).stat().st_size for name in ("m.onnx", "m.data"))
    assert "m.data: 17.38 kB, 1.00 kB of it read by no tensor" in found.to_text()


def test_a_model_that_the_runtime_refuses_is_inspected_without_running() -> None:
    source = with_weights(
        proto("agraph (float[2] x) => (float[2] y) { y = my.Op(x, w) }", imports='"my" : 1'), w=normal(9)
    )
    found = onnxopt.inspect(source)
    assert "no pass was tried and no shape inferred" in found.notes[0]
    assert {each.kind for each in found.estimates} == {"half"}


def test_a_pass_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxopt.passes.dedup import Dedup

    def fail(*_: object) -> None:
        raise RuntimeError("broken\nhere")

    monkeypatch.setattr(Dedup, "run", fail)
    assert wins(inspect_model(load(wasteful())))["duplicates"].what == "not estimated: RuntimeError: broken here"


def test_large_models_are_sampled_and_not_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxopt.inspection import rank, trials, weights

    weight = normal(600, 1000)
    weight[::2] = 0
    source = with_weights(proto("agraph (float[2,600] x) => (float[2,1000] y) { y = MatMul(x, w) }"), w=weight)
    whole = wins(inspect_model(load(source)))
    assert (whole["zeros"].count, whole["zeros"].sample) == (300_000, "")
    monkeypatch.setattr(weights, "_WHOLE", 1000)
    monkeypatch.setattr(trials, "LARGEST", 1000)
    found = wins(inspect_model(load(source)))
    assert found["zeros"].sample == "262,144 of 600,000 elements"
    assert 0.4 < found["zeros"].count / 262_144 < 0.6
    assert found["duplicates"].what.startswith("not estimated: the model holds more than")
    monkeypatch.setattr(rank, "_BUDGET", 1e6)
    found = wins(inspect_model(load(source)))
    assert (found["low_rank"].count, found["low_rank"].sample) == (0, "0 of 1 matrices whole")


def test_distinct_values_are_bits() -> None:
    text = "agraph (float[4] x) => (float[4] y) { y = Identity(x) }"
    weights: dict[str, NDArray[Any]] = {
        "signed": np.array([0.0, -0.0] * 1000, np.float32),
        "nan": np.array([np.nan, 1, np.inf] * 500, np.float32),
        "many": np.arange(5000, dtype=np.float32),
        "rare": np.array([*[1.0] * 9999, 2.0], np.float64),
        "half": np.array([0.5, 0.25] * 600, np.float16),
        "empty": np.zeros((0, 3), np.float32),
    }
    seen = {
        each.data.origin.name: each
        for each in look_at(load(with_weights(proto(text), **weights))).values()
        if each.data.origin
    }
    assert {name: each.distinct for name, each in seen.items()} == {
        "signed": 2, "nan": 3, "many": None, "rare": 2, "half": 2,
    }  # fmt: skip
    assert seen["signed"].zeros == 2000
    assert seen["rare"].palette_bits == 1


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30)])
def test_the_rank_is_that_of_the_best_approximation(shape: tuple[int, int]) -> None:
    matrix = normal(shape[0], 5, seed=1) @ normal(5, shape[1], seed=2) + 1e-2 * normal(*shape, seed=3)
    singular = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    for error in (0.5, 0.1, 1e-3):
        rank = rank_at(matrix, error)
        lost = [np.sqrt((singular[at:] ** 2).sum() / (singular**2).sum()) for at in (rank, max(rank - 1, 0))]
        assert lost[0] <= error
        assert rank == 0 or lost[1] > error
    assert rank_at(np.zeros((4, 5), np.float32), 1e-3) == 0
    assert rank_at(np.full((4, 5), np.nan), 1e-3) == 4


def test_large_matrices_show_their_rank_in_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxopt.inspection import rank

    thin = normal(300, 20, seed=1) @ normal(20, 400, seed=2)
    text = "agraph (float[1,300] x) => (float[1,400] y) { h = MatMul(x, w) y = MatMul(h, v) }"
    source = load(with_weights(proto(text), w=thin, v=normal(400, 400, seed=3)))
    whole = rank.low_rank(source)
    monkeypatch.setattr(rank, "_ONE", 1e6)
    block = rank.low_rank(source)
    assert (whole.matrices, whole.whole, whole.blocks) == (1, 2, 0)
    assert (block.matrices, block.whole, block.blocks) == (1, 0, 2)
    assert block.bytes == whole.bytes == (300 * 400 - 20 * 700) * 4


def test_text_keeps_to_80_columns_and_json_holds_the_record() -> None:
    models = [inspect_model(load(each)) for each in (wasteful(), everything())]
    for shown in (*([model] for model in models), models):
        for detail in (0, 1):
            assert max(map(len, inspection_view.plain(shown, detail).splitlines())) <= 80
    data = json.loads(inspection_view.dump(models))
    assert data["schema_version"] == "1"
    assert [entry["nodes"] for entry in data["models"]] == [model.nodes for model in models]
    assert data["models"][0]["inputs"] == [{"name": "x", "dtype": "float32", "dims": [1, 3, 8, 8], "default": False}]
    assert json.loads(models[0].to_json())["models"][0]["macs"]["unknown"] == 0


def test_a_model_without_weights_or_nodes() -> None:
    found = onnxopt.inspect(proto("agraph (float[2] x) => (float[2] y) { y = Identity(x) }"))
    assert (found.weight_bytes, found.largest, found.macs.layers) == (0, (), 0)
    assert "none: no layer that multiplies weights" in found.to_text()
