"""What a pass is: its options, its effect, what it needs, what it reports."""

from onnxopt.passbase.base import Effect, Pass, option, rewrite
from onnxopt.passbase.lookup import lookup, names, pass_list, pass_lists
from onnxopt.passbase.result import Change, Context, PassResult, Skip

__all__ = [
    "Change",
    "Context",
    "Effect",
    "Pass",
    "PassResult",
    "Skip",
    "lookup",
    "names",
    "option",
    "pass_list",
    "pass_lists",
    "rewrite",
]
