"""What the pruning benchmark computes itself: costs, errors, the search for a share, the rival's process."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.children import Failed, Limits
from benchmarks.pruning.cost import cost
from benchmarks.pruning.errors import Errors, errors
from benchmarks.pruning.ladder import ordered
from benchmarks.pruning.minigraphs import HIDDEN, perceptron, perceptron_feeds
from benchmarks.pruning.rival import Candidate, Level, Rival, Server
from benchmarks.pruning.search import GOOD, TOLERANCE, Hit, share_for
from tests.helpers import proto, run
from tests.passes.quantizing import normal

LIMITS = Limits(20, 8e9)
W, V, U = (", ".join(["0.5"] * size) for size in (24, 18, 12))
BRANCHES = f"""g (float[n, 4] x, bool c) => (float[n, 3] y) <float[4, 6] w = {{{W}}}, float[6, 3] v = {{{V}}}> {{
    h = MatMul (x, w)
    y = If (c) <then_branch = t () => (float[n, 3] a) {{ a = MatMul (h, v) }},
                else_branch = e () => (float[n, 3] b) <float[4, 3] u = {{{U}}}> {{ b = MatMul (x, u) }}>
}}"""


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(("taken", "macs"), [(True, 24 + 18), (False, 24 + 12)])
def test_macs_are_those_of_the_branch_that_ran(taken: bool, macs: int, tmp_path: Path) -> None:
    found = cost(saved(proto(BRANCHES), tmp_path), {"x": normal(5, 4), "c": np.array(taken)})
    assert found.macs == 5 * macs
    assert found.parameters == 24 + 18 + 12
    assert len(found.idle) == 1
    assert "1 layers did not run" in found.told_idle()


def test_a_loop_counts_as_often_as_it_runs(tmp_path: Path) -> None:
    text = """g (float[2, 2] x, int64 n, bool c) => (float[2, 2] y) <float[2, 2] w = {0.1, 0.2, 0.3, 0.4}> {
        y = Loop (n, c, x) <body = b (int64 i, bool p, float[2, 2] s) => (bool q, float[2, 2] r) {
            q = Identity (p)
            r = MatMul (s, w)
        }>
    }"""
    path = saved(proto(text), tmp_path)
    feed = {"x": normal(2, 2), "n": np.array(3, np.int64), "c": np.array(True)}
    assert cost(path, feed).macs == 3 * 8
    assert cost(path, {**feed, "n": np.array(0, np.int64)}).idle == ("MatMul",)


def test_macs_with_weights_that_kernels_pack_and_inputs_that_are_absent(tmp_path: Path) -> None:
    text = """g (float[7, 3, 5] x) => (float[3, 2] y) {
        z, h = GRU <hidden_size = 6> (x, w, r, , , )
        s = Squeeze (h, zero)
        y = Gemm <transB = 1> (s, v, b)
    }"""
    model = proto(text)
    arrays = {"w": normal(1, 18, 5), "r": normal(1, 18, 6), "v": normal(2, 6), "b": normal(2), "zero": np.array([0])}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    found = cost(saved(model, tmp_path), {"x": normal(7, 3, 5)})
    assert found.macs == 7 * 3 * 18 * (5 + 6) + 3 * 6 * 2
    assert found.parameters == 18 * 11 + 12 + 2
    assert found.told_idle() == ""


def test_fused_attention_counts_like_its_parts(tmp_path: Path) -> None:
    text = """g (float[2, 5, 8] x) => (float[2, 5, 8] y) {
        y = com.microsoft.Attention <num_heads = 2> (x, w, b)
    }"""
    model = proto(text, imports='"com.microsoft" : 1')
    tensors = {"w": normal(8, 24), "b": normal(24)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in tensors.items())
    assert cost(saved(model, tmp_path), {"x": normal(2, 5, 8)}).macs == 2 * 5 * 8 * 24 + 2 * (2 * 5 * 5 * 8)


def test_errors_over_all_of_the_worst_and_of_the_first() -> None:
    before = [{"a": normal(4), "n": np.arange(3), "b": normal(5, seed=1)}]
    after = [{"a": 1.1 * before[0]["a"], "n": np.arange(3) + 1, "b": 1.3 * before[0]["b"]}]
    found = errors(before * 2, after * 2)
    powers = [np.square(before[0][name]).sum() for name in "ab"]
    assert found.primary == pytest.approx(0.1, rel=1e-5)
    assert found.worst == pytest.approx(0.3, rel=1e-5)
    assert found.total == pytest.approx(((0.01 * powers[0] + 0.09 * powers[1]) / sum(powers)) ** 0.5, rel=1e-5)
    assert "worst 0.3000" in found.told()
    assert errors(before, before) == Errors(0.0, 0.0, 0.0)
    assert Errors(0.5, 0.5, 0.5).told() == "error 0.5000"


def test_what_can_not_be_compared_is_infinitely_far() -> None:
    before = [{"a": normal(4)}]
    assert errors(before, [{"a": normal(5)}]).total == float("inf")
    assert errors(before, [{"a": np.full(4, np.nan, np.float32)}]).total == float("inf")
    assert errors([{"a": np.zeros(2)}], [{"a": np.ones(2)}]).total == float("inf")
    with pytest.raises(ValueError, match="no float output"):
        errors([{"n": np.arange(2)}], [{"n": np.arange(2)}])


@pytest.mark.parametrize("target", [900, 500, 120])
@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_the_search_comes_near(target: int, power: float) -> None:
    asked: list[float] = []

    def macs_at(share: float) -> int:
        asked.append(share)
        return 1 + int(1000 * (1 - share) ** power)

    if power == 0.5 and target == 120:
        with pytest.raises(Failed, match=r"removes at most 77\.6% of the MACs"):
            share_for(macs_at, 1000, target, {})
        return
    found = share_for(macs_at, 1000, target, {})
    assert abs(found.macs - target) <= GOOD * target
    assert len(asked) <= 8
    known = {share: macs_at(share) for share in list(asked)}
    asked.clear()
    assert share_for(macs_at, 1000, target, known) == found
    assert len(asked) == 1


def test_the_search_says_why_it_ends() -> None:
    with pytest.raises(Failed, match="removes nothing"):
        share_for(lambda share: 1000, 1000, 900, {})
    with pytest.raises(Failed, match=r"comes no nearer than \+11\.1% of the MACs"):
        share_for(lambda share: 1000 if share < 0.4 else 700, 1000, 900, {})
    stepwise = share_for(lambda share: 1000 - 13 * int(share * 60), 1000, 895, {})
    assert isinstance(stepwise, Hit)
    assert abs(stepwise.macs - 895) <= TOLERANCE * 895


def test_the_order_of_recoveries() -> None:
    falling = [Errors(each, each, each) for each in (0.3, 0.3, 0.1)]
    assert ordered(falling)
    assert not ordered(falling[::-1])


SERVER = """
import json, shutil, sys, time
source, feeds, folder, heads, width = sys.argv[1:]
plain = folder + "/plain.onnx"
shutil.copy(source, plain)
print(json.dumps({"version": "0", "prepared": {"plain": plain, "simplified": "failed: no"}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request.get("prune") == "l1":
        print(json.dumps({"error": "ValueError: not today"}), flush=True)
    elif request.get("prune") == "blocks":
        sys.exit("it broke")
    elif request.get("prune") == "wanda":
        time.sleep(60)
    else:
        shutil.copy(request["from"], request["out"])
        share = request.get("sparsity")
        if share is not None:
            with open(request["out"] + ".share", "w") as stream:
                stream.write(str(share))
        print(json.dumps({"seconds": 0.5}), flush=True)
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    source = saved(proto("g (float[2] x) => (float[2] y) { y = Relu(x) }"), tmp_path)
    (tmp_path / "rival").mkdir()
    return [sys.executable, str(script), str(source), "feeds", str(tmp_path / "rival"), "0", "0"]


@pytest.fixture
def server(command: list[str]) -> Iterator[Server]:
    server = Server(command, Limits(1, 8e9))
    yield server
    server.stop()


def test_a_server_that_breaks_or_hangs_is_started_again(server: Server, tmp_path: Path) -> None:
    request = {"from": server.command[2], "out": str(tmp_path / "out.onnx"), "sparsity": 0.5}
    assert server.ask({"prune": "l2", **request}) == {"seconds": 0.5}
    with pytest.raises(Failed, match="failed: ValueError: not today"):
        server.ask({"prune": "l1", **request})
    with pytest.raises(Failed, match="failed: ended with 1: it broke"):
        server.ask({"prune": "blocks", **request})
    with pytest.raises(Failed, match="takes more than 1 s"):
        server.ask({"prune": "wanda", **request})
    assert server.ask({"prune": "l2", **request}) == {"seconds": 0.5}
    assert server.greeting["version"] == "0"


def test_a_level_is_searched_once(command: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "rival"

    def cost_of(path: Path) -> int:
        share = path.with_name(path.name + ".share")
        return round(1000 * (1 - float(share.read_text()))) if share.is_file() else 1000

    def errors_of(path: Path) -> Errors:
        error = 0.0 if path.stem == "plain" else 0.25 if "ridge" in path.name else 0.5
        return Errors(error, error, error)

    def made(key: str) -> Rival:
        return Rival(command, folder, Limits(1, 8e9), cost_of, errors_of, key)

    rival = made("a")
    level = rival.level(700)
    assert level.best(False).macs == pytest.approx(700, rel=GOOD)
    assert level.best(True).recovery == "ridge"
    assert level.best(True).seconds == 1.0
    assert level.left_out["preparation simplified"] == "failed: no"
    assert level.left_out["l1 on plain"] == "failed: ValueError: not today"
    assert level.left_out["blocks on plain"].endswith("it broke")
    assert "takes more than" in level.left_out["wanda on plain"]
    assert rival.level(703) is level
    rival.server.stop()
    again = made("a")
    assert again.level(700) == level
    assert again.server.greeting == {}
    assert made("b")._levels == []
    assert json.loads((folder / "results.json").read_text())["key"].startswith("a, ")


def test_a_level_without_candidates_says_why() -> None:
    level = Level(700, [], {"a": "removes nothing", "b": "failed: x", "c": "removes nothing"})
    with pytest.raises(Failed, match="removes nothing; failed: x"):
        level.best(False)
    raw = Candidate("plain", "l2", 0.5, "", Path("x"), 700, Errors(0.5, 0.5, 0.5), 1.0)
    with pytest.raises(Failed):
        Level(700, [raw]).best(True)


@pytest.mark.slow
def test_the_perceptron_is_trained_and_the_same_each_time() -> None:
    model = perceptron()
    assert model.SerializeToString() == perceptron().SerializeToString()
    assert max(model.graph.initializer[0].dims) == HIDDEN
    rows = perceptron_feeds(2)[1]["x"]
    assert rows.shape == (32, 64)
    scores = run(model, {"x": rows})["y"]
    # a trained one is sure of most rows
    assert np.mean(np.sort(scores)[:, -1] - np.sort(scores)[:, -2]) > 1.0
