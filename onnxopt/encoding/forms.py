"""Smaller forms of a tensor that give back its every bit.

Palettes for few distinct values; for many zeros a bitmask with the other values, or a sparse initializer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import SparseTensorProto, numpy_helper

from onnxopt.encoding.packing import bits_for, packed_nbytes, parts

AnyArray = npt.NDArray[Any]

# Bytes that one node, its tensors' names and a small constant beside it take in a file, as measured on saved models. A
# node repeats the name of its tensor, which is counted with so many characters, so many times.
NODE_BYTES = 100
_NAME_LENGTH = 6
_NAMINGS = 5
# Nodes that unpack a bitmask.
_UNPACKING_NODES = 9
# Constants below this size are not stored, nor stored again: nodes would take more.
LEAST_BYTES = 1024
# Elements from which on a mask is not unpacked: the runtime needs 27 bytes of memory for each while it loads the model.
MOST_MASKED = 1 << 25


@dataclass(frozen=True, eq=False)
class Palette:
    """A tensor whose elements, or vectors of neighbouring elements, come from codebooks.

    codebook: [groups, entries, width], of the tensor's type. indices: unsigned integers below `entries`.
    width 1: `indices` has the tensor's shape; group g is a run of shape[axis] / groups consecutive indices of `axis`.
    width > 1: the tensor in C order is cut into vectors of `width` elements, indices [shape[0], vectors of a row];
    groups run along axis 0.
    """

    shape: tuple[int, ...]
    axis: int
    codebook: AnyArray
    indices: AnyArray

    def __post_init__(self) -> None:
        groups, _, width = self.codebook.shape
        rows = self.shape[0] if self.shape else 1
        if width > 1 and (self.axis != 0 or rows == 0 or (self._size // rows) % width):
            raise ValueError(f"vectors of {width} do not fill the rows of {self.shape}")
        expected = self.shape if width == 1 else (rows, self._size // max(1, rows) // width)
        if self.indices.shape != expected:
            raise ValueError(f"indices of shape {self.indices.shape} where {expected} is needed")
        if groups > 1 and self.shape[self.axis] % groups:
            raise ValueError(f"{groups} groups do not divide axis {self.axis} of {self.shape}")

    @property
    def _size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def groups(self) -> int:
        """How many codebooks there are."""
        return int(self.codebook.shape[0])

    @property
    def entries(self) -> int:
        """Entries of one codebook."""
        return int(self.codebook.shape[1])

    @property
    def width(self) -> int:
        """Elements of one entry."""
        return int(self.codebook.shape[2])

    @property
    def bits(self) -> int:
        """Of one index."""
        return bits_for(self.entries)

    @property
    def offsets(self) -> npt.NDArray[np.int32]:
        """Where each index's codebook begins in the flattened ones, int32, broadcastable to `indices`."""
        runs = self.shape[self.axis] // self.groups if self.shape else 1
        starts = np.repeat(np.arange(self.groups, dtype=np.int32) * self.entries, runs)
        return starts.reshape([-1 if at == self.axis else 1 for at in range(self.indices.ndim)])

    def values(self) -> AnyArray:
        """The tensor, bit for bit what the stored form gives."""
        flat = self.codebook.reshape(-1, self.width)
        at = self.indices.astype(np.int32)
        if self.groups > 1:
            at += self.offsets
        return flat[at].reshape(self.shape)

    @property
    def nbytes(self) -> int:
        """About the bytes in a file: packed indices, codebooks, offsets and nodes."""
        offsets = 4 * self.shape[self.axis] if self.groups > 1 else 0
        return packed_nbytes(self.indices.size, self.bits) + self.codebook.nbytes + offsets + NODE_BYTES * self.nodes

    @property
    def nodes(self) -> int:
        """About how many nodes the form is written as."""
        each = [1 if width == 8 else 6 for width in parts(self.bits)]
        return 1 + (self.groups > 1) + (self.width > 1) + sum(each) + 2 * (len(each) - 1)


@dataclass(frozen=True, eq=False)
class Masked:
    """A tensor as one bit for each element, and the values of those whose bits are not all zero (-0.0 is kept).

    kept: these values in C order [n].
    """

    shape: tuple[int, ...]
    mask: npt.NDArray[np.bool_]
    kept: AnyArray

    @property
    def nbytes(self) -> int:
        """About the bytes in a file: bits, kept values and nodes."""
        return -(-self.mask.size // 8) + int(self.kept.nbytes) + NODE_BYTES * self.nodes

    @property
    def nodes(self) -> int:
        """About how many nodes the form is written as."""
        return _UNPACKING_NODES

    @property
    def density(self) -> float:
        """Share of the elements that are kept."""
        return self.kept.size / max(1, self.mask.size)

    def values(self) -> AnyArray:
        """The tensor, bit for bit what the stored form gives."""
        flat = np.zeros(self.mask.size, self.kept.dtype)
        flat[self.mask] = self.kept
        return flat.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class MaskedPalette:
    """A palette whose indices are stored as one bit each, and those that are not 0 by themselves.

    It is smaller than the palette where many indices are 0: the zeros of a sparse tensor, or any common value.
    """

    palette: Palette

    @classmethod
    def of(cls, palette: Palette) -> MaskedPalette:
        """The form of a palette whose entries are put in another order: the most common one of each group first."""
        groups, entries, _ = palette.codebook.shape
        cut = palette.indices if groups == 1 else np.moveaxis(palette.indices, palette.axis, 0)
        codes = cut.reshape(groups, -1)
        first = np.array([np.bincount(row, minlength=entries).argmax() for row in codes])
        order = np.tile(np.arange(entries), (groups, 1))
        order[np.arange(groups), first] = 0
        order[:, 0] = first
        swapped = np.take_along_axis(order.astype(palette.indices.dtype), codes.astype(np.int64), 1).reshape(cut.shape)
        indices = swapped if groups == 1 else np.moveaxis(swapped, 0, palette.axis)
        codebook = np.take_along_axis(palette.codebook, order[..., None], 1)
        return cls(Palette(palette.shape, palette.axis, codebook, np.ascontiguousarray(indices)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.palette.shape

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Which indices are stored, in C order."""
        return np.asarray(self.palette.indices.reshape(-1) != 0)

    @property
    def density(self) -> float:
        """Share of the indices that are stored."""
        return float(self.mask.mean()) if self.palette.indices.size else 0.0

    @cached_property
    def nbytes(self) -> int:
        """About the bytes in a file: bits, indices that are not 0, codebooks and nodes."""
        count, bits = self.palette.indices.size, self.palette.bits
        saved = packed_nbytes(count, bits) - packed_nbytes(int(self.mask.sum()), bits)
        return self.palette.nbytes - saved + -(-count // 8) + NODE_BYTES * _UNPACKING_NODES

    @property
    def nodes(self) -> int:
        """About how many nodes the form is written as."""
        return self.palette.nodes + _UNPACKING_NODES

    def values(self) -> AnyArray:
        """The tensor, bit for bit what the stored form gives."""
        return self.palette.values()


@dataclass(frozen=True, eq=False)
class Sparse:
    """A tensor as a sparse initializer: an index into it in C order, int64, and a value for each kept element."""

    dense: AnyArray

    @cached_property
    def _at(self) -> npt.NDArray[np.int64]:
        return np.flatnonzero(nonzero(self.dense).reshape(-1)).astype(np.int64)

    @property
    def nbytes(self) -> int:
        """About the bytes in a file: indices and values."""
        return (8 + self.dense.dtype.itemsize) * len(self._at) + NODE_BYTES

    @property
    def nodes(self) -> int:
        """It is an initializer."""
        return 0

    def values(self) -> AnyArray:
        """The tensor."""
        return self.dense

    def proto(self, name: str) -> SparseTensorProto:
        """What the file holds; onnx's checker takes sorted indices of type int64 alone."""
        kept = np.ascontiguousarray(self.dense).reshape(-1)[self._at]
        return SparseTensorProto(
            values=numpy_helper.from_array(kept, name),
            indices=numpy_helper.from_array(self._at),
            dims=self.dense.shape,
        )


Form = Palette | Masked | MaskedPalette | Sparse


def file_bytes(form: Form, name: str) -> int:
    """About the bytes of a form in a file, where the tensor has this name: nodes repeat it."""
    return form.nbytes + named_bytes(form.nodes, name)


def named_bytes(nodes: int, name: str) -> int:
    """About the bytes by which nodes of a stored form take more than NODE_BYTES each, for the length of its name."""
    return _NAMINGS * max(0, len(name.encode()) - _NAME_LENGTH) * nodes


def as_bits(values: AnyArray) -> npt.NDArray[np.unsignedinteger[Any]]:
    """The elements as unsigned integers of their width, so that -0.0 differs from 0.0 and NaNs by their payload."""
    flat = np.ascontiguousarray(values)
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[flat.dtype.itemsize]
    return flat.view(kind)


def nonzero(values: AnyArray) -> npt.NDArray[np.bool_]:
    """Whether each element has any bit set."""
    return np.asarray(as_bits(values) != 0)
