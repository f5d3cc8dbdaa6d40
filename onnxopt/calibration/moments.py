"""Second moments of what layers multiply: for which of them they are gathered, and how those of sharers are joined."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from onnxopt.calibration.statistics import Gram, Statistics
from onnxopt.model import Constant, Node
from onnxopt.numerics.blocks import Wide, shrunk

# Bytes that all matrices may take while they are gathered; a layer of 4,608 inputs takes 340 MB alone.
MOST_BYTES = 384 << 20
ENTRY = 16  # bytes: a compensated float64 sum
_ROUNDING = 1e-12  # of a variance, as a share of the mean square


def affordable(nodes: Iterable[Node]) -> list[Node]:
    """Of Conv, Gemm and MatMul nodes with constant weights those whose moments fit into memory, small ones first.

    Each once, in the order given.
    """
    wanted = list(dict.fromkeys(nodes))
    chosen: set[Node] = set()
    room = MOST_BYTES
    for node in sorted(wanted, key=_size):
        room -= _size(node)
        if room < 0:
            break
        chosen.add(node)
    return [node for node in wanted if node in chosen]


def second_moments(statistics: Statistics, readers: Sequence[Node], centred: Container[Node] = ()) -> list[Wide] | None:
    """E[x x^T] of each group, shrunk for few rows, over all layers that read one weight; None where none is known.

    centred: those of the readers whose own mean is taken out, E[x x^T] - E[x] E[x]^T: what a bias makes good for.
    """
    grams = [(gram, node in centred) for node in readers if (gram := statistics.gram(node)) is not None]
    rows = sum(gram.rows for gram, _ in grams)
    if not grams or len({gram.second.shape for gram, _ in grams}) > 1:
        return None
    each = [(_covariance(gram) if middle else gram.second) * (gram.rows / rows) for gram, middle in grams]
    return [shrunk(second, rows) for second in np.asarray(sum(each))]


def _covariance(gram: Gram) -> npt.NDArray[np.float64]:
    """[groups, K, K], zero for inputs that vary by no more than rounding."""
    found = gram.covariance
    still = np.einsum("gkk->gk", found) <= _ROUNDING * np.einsum("gkk->gk", gram.second)
    return np.where(still[:, :, None] | still[:, None, :], 0.0, found)


def _size(node: Node) -> int:
    """Bytes of the matrices of one layer while they are gathered."""
    weight = node.inputs[1]
    assert isinstance(weight, Constant)
    if node.op == "Conv":
        return int(node.attrs.get("group", 1)) * int(np.prod(weight.shape[1:])) ** 2 * ENTRY
    inputs = weight.shape[-1] if node.op == "Gemm" and node.attrs.get("transB", 0) else weight.shape[-2]
    return int(inputs) ** 2 * ENTRY
