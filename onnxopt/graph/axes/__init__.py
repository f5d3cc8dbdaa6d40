"""Axis maps: which positions of which tensors belong to the same channel, and what is known of their values."""

from onnxopt.graph.axes import dense, elementwise, layout, pooling, reshape
from onnxopt.graph.axes.axis import ONES, Axis, concatenate
from onnxopt.graph.axes.maps import AxisMaps, Parameter, Product, Reader, Site, known_operators, register

__all__ = [
    "ONES",
    "Axis",
    "AxisMaps",
    "Parameter",
    "Product",
    "Reader",
    "Site",
    "concatenate",
    "dense",
    "elementwise",
    "known_operators",
    "layout",
    "pooling",
    "register",
    "reshape",
]
