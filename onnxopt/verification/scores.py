"""What outputs are worth against labels: the built-in figures, each for arrays of all samples.

Scores have shape [..., classes] and labels the shape before it; they are put together along their first axis.
"""

from __future__ import annotations

import numpy as np

from onnxopt.runtime import Array

# Probabilities below this count as this much: a quantised softmax gives exact zeros (Keras uses the same 1e-7).
MIN_PROBABILITY = 1e-7
# Rows of a float16 or quantised softmax miss 1 by up to this.
_SUM_TOLERANCE = 1e-2


def top_k(scores: Array, labels: Array, k: int) -> float:
    """Share of rows whose label is among the k largest scores; of equals the lower class comes first, NaN is wrong."""
    wide = scores.astype(np.float64)
    own = np.take_along_axis(wide, labels[..., None], -1)
    earlier = np.arange(wide.shape[-1]) < labels[..., None]
    rank = ((wide > own) | ((wide == own) & earlier)).sum(-1)
    return float(((rank < k) & ~np.isnan(wide).any(-1)).mean())


def are_probabilities(scores: Array) -> bool:
    """True when every entry lies in [0, 1] and every row sums to 1."""
    wide = scores.astype(np.float64)
    inside = bool(((wide >= 0) & (wide <= 1 + _SUM_TOLERANCE)).all())
    return inside and bool((np.abs(wide.sum(-1) - 1) <= _SUM_TOLERANCE).all())


def nll(scores: Array, labels: Array, probabilities: bool) -> float:
    """Mean negative log-likelihood (nats) of the labels under probabilities or logits."""
    wide = scores.astype(np.float64)
    if probabilities:
        own = np.take_along_axis(wide, labels[..., None], -1)
        return float(-np.log(np.clip(own, MIN_PROBABILITY, None)).mean())
    shifted = wide - wide.max(-1, keepdims=True)
    own = np.take_along_axis(shifted, labels[..., None], -1)
    return float((np.log(np.exp(shifted).sum(-1, keepdims=True)) - own).mean())


def mse(values: Array, labels: Array) -> float:
    """Mean squared error."""
    return float(np.square(values.astype(np.float64) - labels.astype(np.float64)).mean())


def mae(values: Array, labels: Array) -> float:
    """Mean absolute error."""
    return float(np.abs(values.astype(np.float64) - labels.astype(np.float64)).mean())


def auc(scores: Array, labels: Array) -> float:
    """Area under the ROC curve of one score a sample against labels 0 and 1: Mann-Whitney U of ranks, ties halved."""
    _, inverse, counts = np.unique(scores.astype(np.float64), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[inverse.reshape(-1)]
    positive = labels == 1
    wins = ranks[positive].sum() - positive.sum() * (positive.sum() + 1) / 2
    return float(wins / (positive.sum() * (~positive).sum()))
