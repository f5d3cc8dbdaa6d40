"""Which nodes depend on each other, and how groups are told apart."""

from __future__ import annotations

import pytest

from onnxopt.graph.channels import frozen_channels
from onnxopt.pruning.groups import Group, find_groups
from onnxopt.pruning.reads import reads_of
from tests.graph.net import Net
from tests.graph.topologies import TOPOLOGIES
from tests.pruning.nets import mapped, mlp


def groups_of(name: str) -> list[Group]:
    _, maps = mapped(TOPOLOGIES[name]())
    return find_groups(maps, reads_of(maps))


def test_a_stream_with_additions_is_one_group() -> None:
    stream, *inner = groups_of("residual")
    assert len(stream.nodes) == 3
    assert stream.channels == len(stream.sets) == 16
    assert [(len(group.nodes), group.channels) for group in inner] == [(1, 12), (1, 12)]
    assert {read.node.op for read in stream.reads} == {"Conv", "Gemm"}


def test_every_free_set_is_in_one_group() -> None:
    for name in TOPOLOGIES:
        _, maps = mapped(TOPOLOGIES[name]())
        groups = find_groups(maps, reads_of(maps))
        listed = [root for group in groups for root in group.sets]
        made = {root for site in maps.sites for root in maps.channels.roots(site.channels).tolist()}
        assert sorted(listed) == sorted(made - frozen_channels(maps)), name


def test_groups_share_no_set_with_readers_of_others() -> None:
    for name in TOPOLOGIES:
        _, maps = mapped(TOPOLOGIES[name]())
        reads = reads_of(maps)
        for group in find_groups(maps, reads):
            expected = {id(read) for read in reads if set(read.roots.tolist()) & set(group.sets)}
            assert {id(read) for read in group.reads} == expected, name


def test_a_group_describes_itself() -> None:
    (group,) = groups_of("plain")
    assert group.describe(group.sets[:3]) == "3 of 20 channels; read by n2_Conv"
    assert group.name == "n0_Conv"


def test_many_nodes_are_counted() -> None:
    n = Net(1)
    x = n.relu(n.linear("x", 6, 8))
    for _ in range(6):
        x = n.call("Add", x, n.linear(n.relu(n.linear(x, 8, 12)), 12, 8))
    _, maps = mapped(n.model(n.linear(x, 8, 2), ("N", 6), ("N", 2)))
    stream = find_groups(maps, reads_of(maps))[0]
    assert "and 3 more" in stream.describe(())


def test_groups_of_one_structure_have_one_signature() -> None:
    _, first, second = groups_of("residual")
    assert first.signature() == second.signature()
    _, maps = mapped(mlp(hidden=32))
    one, other = find_groups(maps, reads_of(maps))
    assert one.signature() != other.signature()


def test_channels_that_go_in_pairs_are_sets_of_two() -> None:
    (group,) = groups_of("multiplied")
    assert len(group.sets) == 10
    assert sorted(len(read.roots) for read in group.reads) == [20]
    assert set(group.reads[0].roots.tolist()) == set(group.sets)


@pytest.mark.parametrize(
    ("name", "sets", "channels"), [("heads", 4, 24), ("packed_heads", 4, 96), ("shared_keys", 2, 24)]
)
def test_heads_go_whole(name: str, sets: int, channels: int) -> None:
    group = next(group for group in groups_of(name) if len(group.sets) != group.channels)
    assert (len(group.sets), group.channels) == (sets, channels)


def test_outputs_are_in_no_group() -> None:
    _, maps = mapped(TOPOLOGIES["plain"]())
    nodes = {node.name for group in find_groups(maps, reads_of(maps)) for node in group.nodes}
    assert nodes == {"n0_Conv"}
