"""Ranges for codes, chosen from statistics by a calibrator."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnxopt.calibration.calibrators import CALIBRATORS, Measured
from onnxopt.calibration.requests import Requests
from onnxopt.calibration.statistics import Statistics
from onnxopt.model import Variable

MINMAX, MOVING_AVERAGE = "minmax", "moving_average"


def calibration_requests(tensors: Iterable[Variable], calibrators: Iterable[str]) -> Requests:
    """What the calibrators need to know of these tensors."""
    wanted = tuple(tensors)
    return Requests(ranges=wanted, histograms=wanted, extremes=wanted if MOVING_AVERAGE in calibrators else ())


def calibrated_ranges(
    statistics: Statistics, tensors: Iterable[Variable], calibrator: str, *, symmetric: bool = False
) -> dict[Variable, tuple[float, float]]:
    """Tensor -> (low, high) that its codes should cover, for all tensors that have a range; 0 lies within.

    Tensors without the figures that the calibrator needs, as those of inner bodies, get their minimum and maximum.
    """
    measured = {tensor: found for tensor in tensors if (found := statistics.range(tensor)) is not None}
    chosen = {tensor: (min(0.0, found.minimum), max(0.0, found.maximum)) for tensor, found in measured.items()}
    searched = [tensor for tensor in measured if _has_figures(statistics, tensor, calibrator)]
    if calibrator == MINMAX or not searched:
        return chosen
    histograms = [histogram for tensor in searched if (histogram := statistics.histogram(tensor)) is not None]
    means = [mean for tensor in searched if (mean := statistics.mean_extremes(tensor)) is not None]
    averaged = len(means) == len(searched)
    low, high = CALIBRATORS[calibrator](
        Measured(
            np.array([measured[tensor].minimum for tensor in searched]),
            np.array([measured[tensor].maximum for tensor in searched]),
            np.stack([histogram.counts for histogram in histograms]),
            np.array([histogram.exponent for histogram in histograms], np.int64),
            np.array([mean[0] for mean in means]) if averaged else None,
            np.array([mean[1] for mean in means]) if averaged else None,
        ),
        symmetric=symmetric,
    )
    return chosen | dict(zip(searched, zip(low.tolist(), high.tolist(), strict=True), strict=True))


def _has_figures(statistics: Statistics, tensor: Variable, calibrator: str) -> bool:
    if statistics.histogram(tensor) is None:
        return False
    return calibrator != MOVING_AVERAGE or statistics.mean_extremes(tensor) is not None
