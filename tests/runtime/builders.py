"""Tiny models and counting clocks for the tests of sessions, timing and workers."""

from __future__ import annotations

import onnx
from onnx import parser


def build(text: str, opset: int = 21) -> onnx.ModelProto:
    """A model from onnx's textual syntax, without the header."""
    return parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')


def build_bytes(text: str, opset: int = 21) -> bytes:
    serialized: bytes = build(text, opset).SerializeToString()
    return serialized
