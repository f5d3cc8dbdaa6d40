"""The oracle: whole random sets of channels are zeroed, pruned away, and the outputs agree with the zeroed model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from benchmarks.prune import zero_sets
from onnxopt.graph.axes.maps import Split
from onnxopt.graph.channels import frozen_channels
from onnxopt.model import load
from onnxopt.passbase import Context
from onnxopt.passes.prune import Prune
from onnxopt.pruning.maps import axis_maps
from tests.graph.oracle import cut, float_elements, maps_of, silenced, some_sets
from tests.graph.topologies import TOPOLOGIES
from tests.helpers import evaluate, random_feeds, run

# what a zero channel becomes (sigmoid(0), a bias) is not zero: behind padding one of these stays for the others;
# nothing is known of the values that a state takes step by step
CONSTANT_STAYS = {"joined": 1, "multiplied": 1, "normalized": 1, "looped": 12, "scanned": 12, "scanned_aside": 12}


def context() -> Context:
    return Context(evaluate=evaluate)


def removed_by(result: Any) -> int:
    return sum(change.count for change in result.changes)


def relative_error(expected: dict[str, Any], found: dict[str, Any]) -> float:
    assert expected.keys() == found.keys()
    assert all(expected[name].shape == found[name].shape for name in expected)
    pairs = [(expected[n].astype(np.float64), found[n].astype(np.float64)) for n in expected]
    return max(float(np.abs(one - other).max() / max(np.abs(one).max(), 1e-30)) for one, other in pairs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_zeroed_channels_go_and_outputs_stay(name: str, seed: int) -> None:
    model = load(TOPOLOGIES[name]())
    zeroed = zero_sets(model, context(), 0.4, seed)
    assert zeroed > 0
    masked = model.to_proto()
    result = Prune(round_to=1).run(model, context())
    pruned = model.to_proto()
    onnx.checker.check_model(pruned, full_check=True)
    assert removed_by(result) >= zeroed - CONSTANT_STAYS.get(name, 0)
    before, after = (sum(int(np.prod(t.dims)) for t in p.graph.initializer) for p in (masked, pruned))
    assert after < before
    for batch in (1, 3):
        feeds = random_feeds(masked, seed, free=batch)
        assert relative_error(run(masked, feeds), run(pruned, feeds)) < 1e-4


def agrees_with_silenced(proto: ModelProto, split: Split, share: float, seed: int) -> int:
    """Cut a random share of all free sets, signal or not, and compare; returns how many sets went."""
    chosen = some_sets(maps_of(load(proto), split), share, seed)
    if not chosen:
        return 0
    model, expected_size = cut(proto, chosen, split)
    assert float_elements(model) == expected_size < float_elements(load(proto))
    small = model.to_proto()
    onnx.checker.check_model(small, full_check=True)
    quiet = silenced(proto, chosen, split)
    for batch in (1, 3):
        feeds = random_feeds(proto, seed, free=batch)
        assert relative_error(run(quiet, feeds), run(small, feeds)) < 1e-4
    return len(chosen)


@pytest.mark.parametrize("split", ["fewest", "outer", "inner"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_any_sets_go_as_if_they_had_been_silent(name: str, split: Split) -> None:
    """Lossy removal: channels that carry signal go, and the outputs are those of the network that ignores them."""
    proto = TOPOLOGIES[name]()
    for seed, share in ((0, 0.2), (1, 0.6)):
        assert agrees_with_silenced(proto, split, share, seed)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_healthy_network_stays_as_it_is(name: str) -> None:
    model = load(TOPOLOGIES[name]())
    before = model.digest()
    assert not Prune(round_to=1).run(model, context()).changes
    assert model.digest() == before


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_topology_has_channels_to_remove(name: str) -> None:
    """Otherwise the oracle would pass by freezing everything."""
    model = load(TOPOLOGIES[name]())
    maps = axis_maps(model, context())
    made = {root for site in maps.sites for root in maps.channels.roots(site.channels).tolist()}
    assert len(made - frozen_channels(maps)) >= 8


def test_a_cut_that_forgets_one_consumer_is_noticed() -> None:
    """The oracle is no rubber stamp: a channel that is read is removed by force, and the outputs differ."""
    from onnxopt.graph.channels import Plan, remove

    model = load(TOPOLOGIES["plain"]())
    feeds = random_feeds(model)
    expected = run(model, feeds)
    maps = axis_maps(model, context())
    maps.readers.clear()
    remove(maps, Plan({int(maps.sites[0].channels[0]): "dead"}, ()))
    assert relative_error(expected, run(model, feeds)) > 1e-3
