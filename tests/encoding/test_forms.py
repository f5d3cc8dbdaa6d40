"""Forms hold every bit; lossless ones are found where there are any."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.encoding import Masked, MaskedPalette, Palette, find_channel_palette, find_mask, find_palette, smallest
from onnxopt.encoding.packing import bits_for, native, pack, packed_nbytes, parts
from onnxopt.model import TensorData
from tests.encoding.grids import NARROW, Array, same_bits


@given(st.integers(1, 8), st.integers(0, 40), st.integers(0, 1000))
def test_packed_parts_give_the_codes_back(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, count).astype(np.uint8)
    found = np.zeros(count, np.int64)
    below = bits
    for width in parts(bits):
        below -= width
        packed = pack(((codes >> below) & ((1 << width) - 1)).astype(np.uint8), width)
        assert packed.shape == (-(-count * width // 8), 1)
        each = np.concatenate([(packed >> (width * at)) & ((1 << width) - 1) for at in range(8 // width)], 1)
        found += each.reshape(-1)[:count].astype(np.int64) << below
    assert np.array_equal(found, codes)


def test_sizes_of_packed_codes() -> None:
    assert [parts(bits) for bits in (1, 3, 4, 5, 7, 8)] == [(1,), (2, 1), (4,), (4, 1), (4, 2, 1), (8,)]
    assert packed_nbytes(16, 4) == 8
    assert packed_nbytes(17, 3) == 5 + 3
    assert [bits_for(entries) for entries in (1, 2, 3, 16, 17, 256)] == [1, 1, 2, 4, 5, 8]


def test_types_of_codes_by_version() -> None:
    assert native(4, 21, 10) == ml_dtypes.uint4
    assert native(4, 21, 9) is None
    assert native(4, 20, 10) is None
    assert native(2, 25, 13) == ml_dtypes.uint2
    assert native(1, 99, 99) is None
    assert native(8, 7, 3) == np.uint8


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([np.float32, np.float64, *NARROW]), st.integers(1, 300))
def test_a_palette_is_found_exactly_when_there_is_one(seed: int, dtype: npt.DTypeLike, entries: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 40, entries).astype(dtype)[rng.integers(0, entries, (30, 20))]
    distinct = len(np.unique(values.view(f"u{values.dtype.itemsize}")))
    found = find_palette(values, 200)
    assert (found is not None) == (distinct <= 200)
    if found is not None:
        assert found.entries == distinct
        assert same_bits(found.values(), values)


def test_zeros_of_either_sign_and_nans_are_values_of_their_own() -> None:
    values = np.array([0.0, -0.0, np.nan, np.inf, 0.0, -0.0] * 40, np.float32)
    values.view(np.uint32)[7] = 0x7FC00001
    found = find_palette(values)
    assert found is not None
    assert found.entries == 5
    assert same_bits(found.values(), values)
    masked = find_mask(values)
    assert masked.density == pytest.approx(4 / 6)  # 0.0 twice in six
    assert same_bits(masked.values(), values)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_palette_for_each_channel(axis: int) -> None:
    rng = np.random.default_rng(0)
    values = np.moveaxis(
        np.stack([rng.normal(size=12).astype(np.float32)[rng.integers(0, 12, (9, 5))] for _ in range(30)]), 0, axis
    )
    assert find_palette(values) is None
    found = find_channel_palette(values, axis)
    assert found is not None
    assert (found.groups, found.entries, found.bits) == (30, 12, 4)
    assert same_bits(found.values(), values)
    assert find_channel_palette(values, 1 - axis) is None
    one_more = np.array(values)
    one_more[(7, 0, slice(None)) if axis == 0 else (0, 7, slice(None))] = rng.normal(size=5)
    assert find_channel_palette(one_more, axis) is None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.booleans(), st.sampled_from([np.float32, *NARROW]))
def test_masks_keep_every_bit(seed: int, density: float, coarse: bool, dtype: npt.DTypeLike) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.integers(-5, 6, (17, 13)) if coarse else rng.normal(0, 30, (17, 13))).astype(dtype)
    values[rng.random(values.shape) >= density] = 0
    assert same_bits(find_mask(values).values(), values)
    found = find_palette(values)
    if found is not None:
        assert same_bits(MaskedPalette.of(found).values(), values)


def test_the_smallest_form_is_taken_and_none_where_nothing_is_saved() -> None:
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(64, 64)).astype(np.float32)
    assert smallest(TensorData.from_array(dense), palette=True, mask=True) is None
    sparse = np.where(rng.random(dense.shape) < 0.9, 0, dense).astype(np.float32)
    assert isinstance(smallest(TensorData.from_array(sparse), palette=True, mask=True), Masked)
    assert smallest(TensorData.from_array(sparse), palette=False, mask=False) is None
    coarse = np.round(dense).astype(np.float32)
    assert isinstance(smallest(TensorData.from_array(coarse), palette=True, mask=True), Palette)
    assert smallest(TensorData.from_array(coarse[:4, :4]), palette=True, mask=True) is None
    words = np.array(["a", "b"] * 800, np.object_)
    assert smallest(TensorData.from_array(words), palette=True, mask=True) is None
    nibbles = rng.integers(-2, 2, (64, 64)).astype(ml_dtypes.int4)
    assert smallest(TensorData.from_array(nibbles), palette=True, mask=True) is None


def test_a_palette_refuses_what_does_not_fit() -> None:
    codebook: Array = np.zeros((1, 4, 2), np.float32)
    with pytest.raises(ValueError, match="do not fill"):
        Palette((3, 5), 0, codebook, np.zeros((3, 2), np.uint8))
    with pytest.raises(ValueError, match="indices of shape"):
        Palette((3, 4), 0, codebook, np.zeros((3, 4), np.uint8))
    with pytest.raises(ValueError, match="do not divide"):
        Palette((3, 4), 0, np.zeros((2, 4, 1), np.float32), np.zeros((3, 4), np.uint8))


@pytest.mark.parametrize("axis", [0, 1])
def test_the_most_common_entry_of_each_group_is_first(axis: int) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (12, 20)).astype(np.uint8)
    common = rng.integers(0, 8, 4)
    often = np.repeat(common, 12 // 4 if axis == 0 else 20 // 4)
    codes = np.where(rng.random(codes.shape) < 0.6, often[:, None] if axis == 0 else often[None], codes).astype(
        np.uint8
    )
    palette = Palette(codes.shape, axis, rng.normal(size=(4, 8, 1)).astype(np.float32), codes)
    masked = MaskedPalette.of(palette)
    assert same_bits(masked.values(), palette.values())
    assert masked.density < 0.5
    assert np.array_equal(masked.palette.codebook[:, 0, 0], palette.codebook[np.arange(4), common, 0])


def test_a_bitmask_of_indices_is_taken_where_one_is_common() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=16).astype(np.float32)[rng.integers(0, 16, (64, 64))]
    values[rng.random(values.shape) < 0.7] = 0.5
    data = TensorData.from_array(values)
    found = smallest(data, palette=True, mask=True)
    assert isinstance(found, MaskedPalette)
    assert isinstance(smallest(data, palette=True, mask=False), Palette)
    assert same_bits(found.values(), values)
