"""The list `simplify`: all that makes a graph smaller and leaves what it computes as it is, but for rounding.

First what is known before the model runs, then what is said twice or in vain, then nodes that one operator can stand
for. What comes late makes room for what came early, so some passes stand in it more than once.
"""

from __future__ import annotations

SIMPLIFY: tuple[str, ...] = (
    "inline_functions",
    "eliminate_dead_code",
    "fold_constants",
    "simplify_shapes",
    "flatten_if",
    "eliminate_identity",
    "eliminate_default_inputs",
    "eliminate_common_subexpressions",
    "fuse_consecutive",
    "simplify_shapes",
    "fold_constants",
    "flatten_if",
    "eliminate_identity",
    "fuse_consecutive",
    "eliminate_identity",
    "fuse_consecutive",
    "eliminate_common_subexpressions",
    "fuse_bn",
    "fuse_pad",
    "fuse_mul_add",
    "fuse_pad",
    "fuse_matmul_add",
    "fuse_hard_swish",
    "recompose",
    "eliminate_dead_code",
    "dedup",
)
