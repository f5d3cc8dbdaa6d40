"""What this machine's processor is."""

from __future__ import annotations

import functools
import platform
import subprocess
from pathlib import Path

# As Linux spells them, and as macOS does.
_DOT_PRODUCT = frozenset({"avx512_vnni", "avx_vnni", "avx512vnni"})


@functools.cache
def machine() -> str:
    """The architecture, lower case: `x86_64`, `amd64`, `aarch64`, `arm64`."""
    return platform.machine().lower()


@functools.cache
def flags() -> str:
    """The instruction sets of the processor as its system lists them; empty where it can't be asked.

    Linux: `/proc/cpuinfo`. macOS: `sysctl machdep.cpu.leaf7_features`. Windows has no list that can be read without
    running machine code.
    """
    try:
        if platform.system() == "Linux":
            return cpuinfo_flags(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
        if platform.system() == "Darwin":
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.leaf7_features"]
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        pass
    return ""


def cpuinfo_flags(text: str) -> str:
    """The flags that every processor in the text of `/proc/cpuinfo` has, sorted."""
    lines = [line.partition(":")[2].split() for line in text.splitlines() if line.split(":")[0].strip() == "flags"]
    common = set.intersection(*map(set, lines)) if lines else set()
    return " ".join(sorted(common))


def has_dot_product(text: str) -> bool:
    """Whether a list of flags names AVX512-VNNI or AVX-VNNI."""
    return bool(_DOT_PRODUCT & set(text.lower().split()))
