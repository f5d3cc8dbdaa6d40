"""Requests for statistics of a graph's tensors, and the streaming run that answers them."""

from onnxopt.calibration.collect import collect
from onnxopt.calibration.requests import Requests
from onnxopt.calibration.statistics import Range, Statistics

__all__ = ["Range", "Requests", "Statistics", "collect"]
