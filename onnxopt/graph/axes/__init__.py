"""Axis maps: which positions of which tensors belong to the same channel, and what is known of their values."""

from onnxopt.graph.axes import (
    attention,
    bodies,
    dense,
    einsum,
    elementwise,
    growing,
    layout,
    matmul,
    normalization,
    pooling,
    recurrent,
    reshape,
)
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
    "attention",
    "bodies",
    "concatenate",
    "dense",
    "einsum",
    "elementwise",
    "growing",
    "known_operators",
    "layout",
    "matmul",
    "normalization",
    "pooling",
    "recurrent",
    "register",
    "reshape",
]
