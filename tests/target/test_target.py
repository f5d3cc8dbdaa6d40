import math
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxopt import target
from onnxopt.target import cpu
from onnxopt.target.costs import MEASURED, read_measured

NAMES = ["x86", "x86-vnni", "arm64", "tensorrt", "openvino", "qnn", "web"]


@pytest.mark.parametrize(
    ("machine", "name"),
    [("x86_64", "x86"), ("AMD64", "x86"), ("aarch64", "arm64"), ("arm64", "arm64"), ("riscv64", "x86")],
)
def test_auto_follows_the_architecture(machine: str, name: str) -> None:
    assert target.resolve("auto", machine).name == name
    assert target.resolve(None, machine).name == name
    assert target.resolve("auto", machine) is target.TARGETS[name]


@pytest.mark.parametrize("flags", ["avx2 avx512f avx512_vnni", "sse4_2 avx_vnni", "AVX512F AVX512VNNI RDSEED"])
def test_auto_with_vnni_takes_its_costs_but_weights_that_are_safe_without(flags: str) -> None:
    found = target.resolve("auto", "x86_64", flags)
    plain, vnni = target.TARGETS["x86"], target.TARGETS["x86-vnni"]
    assert found.saturates
    assert found.name == "x86"
    assert "VNNI" in found.summary
    assert found.costs == vnni.costs != plain.costs
    assert found == replace(plain, summary=found.summary, costs=vnni.costs, measured=vnni.measured)


@pytest.mark.parametrize("flags", ["", "sse2 avx avx2 fma", "avx512f avx512bw", "not_avx_vnni avx_vnni_int"])
def test_auto_without_vnni_is_plain(flags: str) -> None:
    assert target.resolve("auto", "x86_64", flags) is target.TARGETS["x86"]


def test_flags_of_other_architectures_mean_nothing() -> None:
    assert target.resolve("auto", "aarch64", "avx512_vnni") is target.TARGETS["arm64"]


@pytest.mark.parametrize("name", NAMES)
def test_named_targets_are_the_same_on_every_machine(name: str) -> None:
    for machine, flags in [("x86_64", "avx512_vnni"), ("x86_64", ""), ("arm64", ""), (None, None)]:
        assert target.resolve(name, machine, flags) is target.TARGETS[name]


def test_this_machine_is_read() -> None:
    found = target.resolve("auto")
    assert found == target.resolve("auto", cpu.machine(), cpu.flags())
    assert found == target.resolve(None)


def test_flags_are_those_that_every_processor_has() -> None:
    text = "processor\t: 0\nflags\t\t: fpu avx2 avx_vnni\nbugs\t: x\n\nprocessor : 1\nflags : fpu avx2\n"
    assert cpu.cpuinfo_flags(text) == "avx2 fpu"
    assert cpu.cpuinfo_flags("Features : asimd asimddp\n") == ""
    assert cpu.cpuinfo_flags("") == ""


@pytest.mark.parametrize(
    ("system", "expected"), [("Linux", ""), ("Darwin", ""), ("Windows", "")], ids=["linux", "macos", "windows"]
)
def test_flags_that_cannot_be_read_are_none(system: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise OSError("no such thing")

    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(Path, "read_text", fails)
    monkeypatch.setattr("subprocess.run", fails)
    assert cpu.flags.__wrapped__() == expected


def test_the_targets() -> None:
    assert list(target.TARGETS) == NAMES
    assert all(name == found.name for name, found in target.TARGETS.items())


def test_number_formats() -> None:
    found = {name: (each.activation.name, each.symmetric, each.saturates) for name, each in target.TARGETS.items()}
    assert found == {
        "x86": ("uint8", False, True),
        "x86-vnni": ("uint8", False, False),
        "arm64": ("int8", False, False),
        "tensorrt": ("int8", True, False),
        "openvino": ("uint8", False, True),
        "qnn": ("uint8", False, False),
        "web": ("uint8", False, False),
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_symmetric_target_has_signed_codes(name: str) -> None:
    found = target.TARGETS[name]
    assert not found.symmetric or found.activation == np.int8
    assert found.channels % 4 == 0
    assert found.per_channel <= {"Conv", "Gemm", "MatMul"}
    assert not (found.architectures and not found.integer_kernels)


def test_a_target_resolves_to_itself_and_unknown_names_are_listed() -> None:
    arm = target.TARGETS["arm64"]
    assert target.resolve(arm) is arm
    with pytest.raises(ValueError, match="known: auto, x86, x86-vnni, arm64, tensorrt, openvino, qnn, web"):
        target.resolve("tpu")


@pytest.mark.parametrize("name", NAMES)
def test_integer_kernels_of_dense_layers_pay_by_the_facts(name: str) -> None:
    costs = target.TARGETS[name].costs
    assert 0 < costs.integer_mac < costs.float_mac
    assert costs.integer_mac <= costs.unsigned_mac < costs.float_mac
    assert 0 < costs.dynamic_mac <= costs.float_mac
    assert costs.float_mac < costs.float_depthwise_mac
    assert costs.convert > 0
    assert costs.node >= 0
    assert costs.float_element > 0
    assert costs.integer_element > 0
    assert costs.source


def test_measured_tables_are_those_of_the_files() -> None:
    found = {path.stem: read_measured(path.stem) for path in sorted(MEASURED.glob("*.json"))}
    assert "x86-vnni" in found
    for name, costs in found.items():
        assert target.TARGETS[name].costs == costs
        assert target.TARGETS[name].measured
        assert costs is not None
        assert not any(math.isnan(value) for value in vars(costs).values() if isinstance(value, float))
    assert read_measured("tpu") is None
