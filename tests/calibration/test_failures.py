"""Samples that the model refuses, feeds that break off, requests about what is not there; and memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from onnxopt.calibration import Requests, collect
from onnxopt.errors import FeedError
from onnxopt.feeds import Sample
from onnxopt.model import Node, Variable
from tests.calibration.conftest import Made
from tests.calibration.truth import everything, tensor, tensors
from tests.helpers import model

PRODUCT = "g (float[n, 3] x, float[m, 2] z) => (float[n, 2] y) { a = Neg(x)  b = MatMul(a, z)  y = Exp(b) }"
ROWS = "g (float[n, 3] x, float[n, 2] z) => (float[n, 5] y) { a = Neg(x)  b = Concat<axis = 1>(a, z)  y = Exp(b) }"


def feeds(*shapes: tuple[int, ...], rows: int = 3) -> list[Sample]:
    inputs = [{"x": np.ones(shape, np.float32), "z": np.ones((rows, 2), np.float32)} for shape in shapes]
    return [Sample(each, None, f"sample {at}") for at, each in enumerate(inputs)]


@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("wrong", [(1, 4), (1, 3, 1), (3,)])
def test_a_sample_of_a_wrong_shape_is_named(at: int, wrong: tuple[int, ...]) -> None:
    the_model = model(PRODUCT)
    samples = feeds(*[(1, 3)] * 5)
    samples[at] = Sample({**samples[at].inputs, "x": np.ones(wrong, np.float32)}, None, "the odd one")
    for names in ("x", "a b y"):
        with pytest.raises(FeedError, match=r"sample the odd one: the model fails on it: .*x") as caught:
            collect(the_model, everything(tensors(the_model, names)), samples)
        assert caught.value.remedy == "correct this sample, or leave it out"


def test_a_sample_that_fails_in_the_middle_of_the_model_is_named() -> None:
    """Shapes that agree with the inputs' but not with each other; only what comes before is asked about."""
    the_model = model(PRODUCT)
    samples = [*feeds(*[(1, 3)] * 4), *feeds((1, 3), rows=5)]
    samples[-1] = Sample(samples[-1].inputs, None, "the odd one")
    for wanted in (tensors(the_model, "b"), tensors(the_model, "a b")):
        with pytest.raises(FeedError, match=r"sample the odd one: the model fails on it: .*MatMul"):
            collect(the_model, everything(wanted), samples)


def test_the_odd_member_of_a_batch_is_named() -> None:
    text = """g (float[n] x, int64[n] i) => (float[n] y) <float[3] w = {1, 2, 3}> {
      a = Gather(w, i)  b = Mul(a, x)  y = Neg(b) }"""
    the_model = model(text)
    samples = [
        Sample({"x": np.ones(1, np.float32), "i": np.array([index])}, None, f"number {at}")
        for at, index in enumerate([0, 1, 2, 0, 7, 1])
    ]
    for batch in (1, 2, 3, 6):
        with pytest.raises(FeedError, match=r"sample number 4: the model fails on it: .*Gather"):
            collect(the_model, everything(tensors(the_model, "a b")), samples, batch=batch)


def test_a_model_that_takes_no_batches_says_so() -> None:
    the_model = model("g (float[n, 4] x) => (float[2, 2] y) <int64[2] s = {2, 2}> { a = Neg(x)  y = Reshape(a, s) }")
    samples = feeds(*[(1, 4)] * 3)
    samples = [Sample({"x": sample.inputs["x"]}, None, sample.source) for sample in samples]
    requests = everything(tensors(the_model, "a y"))
    assert collect(the_model, requests, samples).samples == 3
    with pytest.raises(FeedError, match="the model fails on 3 samples joined, sample 0 to sample 2") as caught:
        collect(the_model, requests, samples, batch=3)
    assert caught.value.remedy == "run one feed at a time"


@pytest.mark.parametrize("batch", [1, 2])
def test_an_input_that_is_missing_or_unknown_names_the_sample(batch: int) -> None:
    the_model = model(PRODUCT)
    for change in ({}, {"q": np.ones(1, np.float32)}):
        samples = feeds((1, 3), (1, 3))
        inputs: dict[str, Any] = {"x": samples[1].inputs["x"], **change}
        if change:
            inputs["z"] = samples[1].inputs["z"]
        samples[1] = Sample(inputs, None, "the odd one")
        with pytest.raises(FeedError, match="sample the odd one: the model fails on it"):
            collect(the_model, everything(tensors(the_model, "a b")), samples, batch=batch)


def test_feeds_that_break_off_raise_as_they_do() -> None:
    the_model = model(ROWS)

    def broken() -> Iterator[Sample]:
        yield from feeds((1, 3), (1, 3), rows=1)
        raise FeedError("sample 3 can't be read", "mend it")

    for batch in (1, 2, 8):
        with pytest.raises(FeedError, match="sample 3 can't be read"):
            collect(the_model, everything(tensors(the_model, "a b")), broken(), batch=batch)


@pytest.mark.parametrize("batch", [1, 4])
def test_no_feeds_are_an_error(batch: int) -> None:
    the_model = model(PRODUCT)
    with pytest.raises(FeedError, match="there are no feeds"):
        collect(the_model, everything(tensors(the_model, "a")), iter(()), batch=batch)


def test_what_is_not_in_the_model_is_skipped() -> None:
    the_model, other = model(PRODUCT), model(PRODUCT)
    a, stranger = tensor(the_model, "a"), tensor(other, "a")
    node = Node("MatMul", inputs=[stranger, tensor(other, "b")], outputs=[Variable("c")])
    requests = everything((a, stranger), (1,)) | Requests(grams=(other.graph.nodes[1], node))
    found = collect(the_model, requests, feeds((2, 3)))
    assert {name for name, _ in found.skipped} == {"a", "b", "c"}
    for kind, wanted in requests.by_kind().items():
        for subject in wanted:
            variable = subject[0] if isinstance(subject, tuple) else subject
            assert (found.reason(subject, kind) is None) is (variable is a)
    assert found.range(a) is not None
    assert found.range(stranger) is None
    assert found.gram(node) is None


def test_nothing_but_strangers_runs_nothing(made: Made) -> None:
    the_model, other = model(PRODUCT), model(PRODUCT)
    found = collect(the_model, everything(tensors(other, "a b")), feeds((2, 3)))
    assert (found.samples, made.runs) == (0, 0)
    assert found.reason(tensor(other, "a")) == "is not produced in the model"


def test_an_output_is_measured_where_it_is_made_not_where_it_is_read() -> None:
    """A tensor that is an input and an output at once, and one that is nothing else."""
    the_model = model("g (float[n] x) => (float[n] x, float[n] y) { y = Neg(x) }")
    x, y = tensors(the_model, "x y")
    samples = [Sample({"x": np.array([1, 2], np.float32)}, None, "sample 0")]
    found = collect(the_model, everything((x, y)), samples)
    assert [(r.minimum, r.maximum) for r in (found.range(x), found.range(y)) if r] == [(1, 2), (-2, -1)]


@pytest.mark.parametrize("batch", [1, 2])
def test_progress(batch: int) -> None:
    the_model = model(ROWS)
    told: list[tuple[int, int]] = []
    samples = feeds((1, 3), (1, 3), (1, 3), rows=1)
    collect(
        the_model,
        everything(tensors(the_model, "a")),
        iter(samples) if batch == 2 else samples,
        batch=batch,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == ([(1, 3), (2, 3), (3, 3)] if batch == 1 else [(2, 0), (3, 0)])


def test_memory_does_not_grow_with_the_samples() -> None:
    """Nor with the number of shapes that they come in."""
    the_model = model("g (float[n, c, t] x) => (float[n, c, t] y) { a = Relu(x)  y = Neg(a) }")
    requests = everything(tensors(the_model, "a y"), (0,))

    def many(count: int) -> Iterator[Sample]:
        rng = np.random.default_rng(0)
        for at in range(count):
            yield Sample({"x": rng.random((1, 1 + at % 40, 1 + at % 43), np.float32)}, None, str(at))

    def peak(count: int) -> int:
        tracemalloc.start()
        collect(the_model, requests, many(count))
        largest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return largest

    peak(10)
    few, lots = peak(300), peak(1500)
    assert lots < few + 500_000


def test_memory_of_one_run_is_shared_among_sessions(made: Made) -> None:
    """No session hands over more than allowed, also after samples grew."""
    nodes = "  ".join(f"t{at + 1} = Neg(t{at})" for at in range(8))
    the_model = model(f"g (float[n, 100] x) => (float[n, 100] y) {{ t0 = Relu(x)  {nodes}  y = Neg(t8) }}")
    requests = everything(tensors(the_model, " ".join(f"t{at}" for at in range(9))))
    sizes = [2, 2, 5, 5, 20, 3, 20, 19]
    samples = [Sample({"x": np.ones((rows, 100), np.float32)}, None, str(rows)) for rows in sizes]
    allowed = 20_000
    found = collect(the_model, requests, samples, memory=allowed)
    assert 0 < max(size for count, size in made.handed if count > 1) <= allowed
    assert max(size for count, size in made.handed) <= allowed
    measured = found.range(tensor(the_model, "t8"))
    assert measured is not None
    assert measured.count == 100 * sum(sizes)
