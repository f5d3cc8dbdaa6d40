"""Reasoning about shapes whose lengths are numbers, names or unknown."""

from __future__ import annotations

from onnxopt.rewriting.view import Shape


def same_elements_in_place(before: Shape | None, after: Shape | None, filled: bool) -> bool:
    """Whether two shapes of equally many elements are the same: all lengths but one agree, and so does that one.

    filled: that there are elements is certain. Else lengths that agree must be numbers: of 0 rows any length is right.
    """
    if before is None or after is None or len(before) != len(after):
        return False
    if not filled and any(isinstance(length, str) for length in before if length in after):
        return False
    other = [old for old, new in zip(before, after, strict=True) if old is None or old != new]
    agreeing = [old for old, new in zip(before, after, strict=True) if old is not None and old == new]
    return len(other) <= 1 and 0 not in agreeing


def reshape_target(before: Shape | None, after: Shape | None) -> list[int] | None:
    """Constant entries that make Reshape (allowzero=0) turn `before` into `after`; None where there are none.

    0 takes over the length that stands at the same place, -1 what the others leave.
    """
    if after is None:
        return None
    entries = [length if isinstance(length, int) else None for length in after]
    if 0 in entries:
        return None
    for at, length in enumerate(after):
        if isinstance(length, str) and before is not None and at < len(before) and before[at] == length:
            entries[at] = 0
    # beside -1 the runtime takes no length that is 0, as open ones may be
    if entries.count(None) > 1 or (None in entries and 0 in entries):
        return None
    if entries.count(0) == 1 and None not in entries:
        entries[entries.index(0)] = -1
    return [-1 if entry is None else entry for entry in entries]


def spreads_over(small: Shape | None, large: Shape | None) -> bool:
    """Whether a tensor of shape `small` certainly broadcasts to `large` and leaves `large` as it is."""
    if small is None or (large is None and small):
        return False
    if large is None:
        return True
    if len(small) > len(large):
        return False
    pairs = zip(small[::-1], large[::-1], strict=False)
    return all(length == 1 or (length is not None and length == whole) for length, whole in pairs)
