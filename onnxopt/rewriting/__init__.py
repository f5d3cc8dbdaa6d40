"""Rewrite rules: what to look for, when it may be replaced, by what; and the one driver that applies them."""

from onnxopt.rewriting.driver import LOOKS_ALIKE, Rule, rewrite
from onnxopt.rewriting.edits import Edits
from onnxopt.rewriting.make import Make
from onnxopt.rewriting.pattern import REST, Match, any_of, constant, number, op, tensor
from onnxopt.rewriting.view import View

__all__ = [
    "LOOKS_ALIKE",
    "REST",
    "Edits",
    "Make",
    "Match",
    "Rule",
    "View",
    "any_of",
    "constant",
    "number",
    "op",
    "rewrite",
    "tensor",
]
