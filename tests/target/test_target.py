import numpy as np
import pytest

from onnxopt import target


@pytest.mark.parametrize(
    ("machine", "name"),
    [("x86_64", "x86"), ("AMD64", "x86"), ("aarch64", "arm64"), ("arm64", "arm64"), ("riscv64", "x86")],
)
def test_auto_follows_the_architecture(machine: str, name: str) -> None:
    assert target.resolve("auto", machine).name == name
    assert target.resolve(None, machine).name == name


def test_auto_never_takes_a_target_that_only_some_machines_can_run() -> None:
    assert target.resolve("auto", "x86_64").saturates
    assert not target.TARGETS["x86-vnni"].saturates


def test_number_formats() -> None:
    assert target.resolve("x86").activation == np.uint8
    assert target.resolve("x86-vnni").activation == np.uint8
    assert target.resolve("arm64").activation == np.int8


def test_a_target_resolves_to_itself_and_unknown_names_are_listed() -> None:
    arm = target.TARGETS["arm64"]
    assert target.resolve(arm) is arm
    with pytest.raises(ValueError, match="known: auto, x86, x86-vnni, arm64"):
        target.resolve("tpu")


@pytest.mark.parametrize("name", sorted(target.TARGETS))
def test_integer_kernels_of_dense_layers_pay_by_the_facts(name: str) -> None:
    costs = target.TARGETS[name].costs
    assert 0 < costs.integer_mac < costs.float_mac
    assert costs.float_mac < costs.float_depthwise_mac
    assert costs.convert > 0
    assert costs.node > 0
