"""Requests for statistics of a graph's tensors, and the streaming run that answers them."""

from onnxopt.calibration.calibrators import CALIBRATORS, choose
from onnxopt.calibration.collect import collect
from onnxopt.calibration.ranges import calibrated_ranges, calibration_requests
from onnxopt.calibration.requests import Requests
from onnxopt.calibration.statistics import Gram, Moments, Range, Statistics

__all__ = [
    "CALIBRATORS",
    "Gram",
    "Moments",
    "Range",
    "Requests",
    "Statistics",
    "calibrated_ranges",
    "calibration_requests",
    "choose",
    "collect",
]
