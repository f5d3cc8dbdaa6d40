"""Lossless forms of tensors as they are: few distinct values, many zeros."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.encoding.forms import MOST_MASKED, AnyArray, Form, Masked, MaskedPalette, Palette, Sparse, as_bits, nonzero
from onnxopt.encoding.packing import bits_for
from onnxopt.model.tensor_data import PACKED_BITS

# Elements that are looked at before all of them are.
_SAMPLE = 4096
# Entries of a codebook that one index of an axis may have to itself.
_CHANNEL_ENTRIES = 16


def find_palette(values: AnyArray, most: int = 256) -> Palette | None:
    """A palette of the tensor when it has at most `most` distinct values, told apart by their bits; else None."""
    if values.size == 0:
        return None
    bits = as_bits(values)
    distinct = _distinct(bits.reshape(-1), most)
    if distinct is None:
        return None
    # in the order of the values, so that the codebook reads well
    order = np.argsort(distinct.view(values.dtype).astype(np.float64), kind="stable")
    rank = np.empty(len(order), np.uint8)
    rank[order] = np.arange(len(order), dtype=np.uint8)
    codes = rank[np.searchsorted(distinct, bits)]
    return Palette(values.shape, 0, distinct[order].view(values.dtype).reshape(1, -1, 1), codes.reshape(values.shape))


def find_channel_palette(values: AnyArray, axis: int, most: int = _CHANNEL_ENTRIES) -> Palette | None:
    """A palette for each index of `axis`, when none of them has more than `most` distinct values; else None."""
    if values.ndim < 2 or values.size == 0:
        return None
    rows = np.moveaxis(as_bits(values), axis, 0).reshape(values.shape[axis], -1)
    if _distinct(rows[0], most) is None or _distinct(rows[-1], most) is None:
        return None
    ordered = np.sort(rows, axis=1)
    first = np.ones(ordered.shape, np.bool_)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    counts = first.sum(axis=1)
    entries = int(counts.max())
    if entries > most:
        return None
    codebook = np.zeros((len(rows), entries), rows.dtype)
    codes = np.empty(rows.shape, np.uint8)
    starts = np.concatenate([[0], np.cumsum(counts)])
    found = ordered[first]
    for at, row in enumerate(rows):
        own = found[starts[at] : starts[at + 1]]
        codebook[at, : len(own)] = own
        codes[at] = np.searchsorted(own, row)
    others = [size for index, size in enumerate(values.shape) if index != axis]
    indices = np.moveaxis(codes.reshape(values.shape[axis], *others), 0, axis)
    return Palette(values.shape, axis, codebook.view(values.dtype)[..., None], np.ascontiguousarray(indices))


def find_mask(values: AnyArray) -> Masked:
    """The bitmask of a tensor with the values that are not zero."""
    mask = nonzero(values).reshape(-1)
    return Masked(values.shape, mask, np.ascontiguousarray(values).reshape(-1)[mask])


def _distinct(bits: npt.NDArray[Any], most: int) -> npt.NDArray[Any] | None:
    """The distinct values in order, None where there are more than `most`."""
    known = np.unique(bits[:: max(1, bits.size // _SAMPLE)])
    while len(known) <= most:
        at = np.minimum(np.searchsorted(known, bits), len(known) - 1)
        others = bits[known[at] != bits]
        if not others.size:
            return known
        known = np.union1d(known, others[: _SAMPLE * most])
    return None


def forms(values: AnyArray, *, palette: bool, mask: bool, sparse: bool = False) -> Iterator[Form]:
    """The forms that give back every bit of a tensor, whatever their size."""
    if values.dtype.name in PACKED_BITS or values.dtype.kind not in "fiuV" or values.size < 2:
        return
    zeros = (mask or sparse) and not nonzero(values).all()
    if sparse and zeros:
        yield Sparse(values)
    if mask and zeros and values.size <= MOST_MASKED:
        yield find_mask(values)
    for found in _palettes(values) if palette else ():
        yield found
        if mask and values.size <= MOST_MASKED:
            yield MaskedPalette.of(found)


def _palettes(values: AnyArray) -> Iterator[Palette]:
    whole = find_palette(values)
    if whole is not None and whole.bits < 8 * values.dtype.itemsize:
        yield whole
    if values.ndim < 2 or (whole is not None and whole.bits <= bits_for(2)):
        return
    for axis in range(2):
        own = find_channel_palette(values, axis)
        if own is not None:
            yield own
