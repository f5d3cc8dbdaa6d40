"""Codes of 1 to 8 bits, packed into bytes.

A code of 5 bits is stored as its upper 4 bits and its lowest bit: parts whose width divides 8, so that no code lies
across two bytes.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

# Where a part of so many bits has an element type of its own: operator set, IR version, type (onnx, docs/IR.md).
_NATIVE: dict[int, tuple[int, int, npt.DTypeLike]] = {
    4: (21, 10, ml_dtypes.uint4),
    2: (25, 13, ml_dtypes.uint2),
    8: (1, 1, np.uint8),
}


def parts(bits: int) -> tuple[int, ...]:
    """Widths of the parts of a code, the upper one first: 8, 4, 2 and 1 that add up to `bits`."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def native(width: int, opset: int, ir_version: int) -> npt.DTypeLike | None:
    """The element type that holds a part of so many bits, None where this version of the format has none."""
    since, ir_since, dtype = _NATIVE.get(width, (1 << 30, 0, None))
    return dtype if opset >= since and ir_version >= ir_since else None


def pack(codes: npt.NDArray[np.uint8], width: int) -> npt.NDArray[np.uint8]:
    """[n] codes below 2^width as bytes [ceil(n * width / 8), 1]: the first of a byte in its lowest bits."""
    each = 8 // width
    filled = np.zeros(-(-codes.size // each) * each, np.uint8)
    filled[: codes.size] = codes.reshape(-1)
    rows = filled.reshape(-1, each)
    packed = np.zeros(len(rows), np.uint8)
    for at in range(each):
        packed |= rows[:, at] << np.uint8(at * width)
    return packed[:, None]


def packed_nbytes(count: int, bits: int) -> int:
    """Bytes of `count` packed codes."""
    return sum(-(-count * width // 8) for width in parts(bits))


def bits_for(entries: int) -> int:
    """Bits of a code that tells so many entries apart, 1 at least."""
    return max(1, int(entries - 1).bit_length())
