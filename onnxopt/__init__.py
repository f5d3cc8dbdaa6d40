"""onnxopt: make trained ONNX models small and fast, and prove what it cost.

The names below are loaded on first use, so that `import onnxopt` stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from onnxopt.api import calibrate, check, compare, diff, inspect, load, merge, optimize
    from onnxopt.errors import OnnxoptError
    from onnxopt.passbase import Change, Context, Effect, Pass, PassResult, Skip, option, rewrite

_HOMES = {
    "calibrate": "onnxopt.api",
    "check": "onnxopt.api",
    "compare": "onnxopt.api",
    "diff": "onnxopt.api",
    "inspect": "onnxopt.api",
    "load": "onnxopt.api",
    "merge": "onnxopt.api",
    "optimize": "onnxopt.api",
    "OnnxoptError": "onnxopt.errors",
    "Change": "onnxopt.passbase",
    "Context": "onnxopt.passbase",
    "Effect": "onnxopt.passbase",
    "Pass": "onnxopt.passbase",
    "PassResult": "onnxopt.passbase",
    "Skip": "onnxopt.passbase",
    "option": "onnxopt.passbase",
    "rewrite": "onnxopt.passbase",
}

__all__ = [
    "Change",
    "Context",
    "Effect",
    "OnnxoptError",
    "Pass",
    "PassResult",
    "Skip",
    "__version__",
    "calibrate",
    "check",
    "compare",
    "diff",
    "inspect",
    "load",
    "merge",
    "optimize",
    "option",
    "rewrite",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onnxopt' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
