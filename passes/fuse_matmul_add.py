"""Make one Gemm of a matrix product and the sum that follows.

    Before                      After
    t = MatMul(x, w)            y = Gemm(x, w, b)
    y = Add(t, b)

where x and w have two axes and b spreads over the product. A Gemm without addend takes the sum up likewise. Floats
only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from onnxopt.model import Model
from onnxopt.passbase import Context, Effect, Pass, PassResult
from onnxopt.rewriting import LOOKS_ALIKE, Make, Match, Rule, View, op, rewrite, tensor
from onnxopt.rewriting.shapes import spreads_over

x, w, b = tensor("x"), tensor("w"), tensor("b")


@dataclass(frozen=True)
class FuseMatmulAdd(Pass):
    """Make one Gemm of a MatMul of two matrices and the Add that follows."""

    name: ClassVar[str] = "fuse_matmul_add"

    @property
    def effect(self) -> Effect:
        """The sum may begin with the addend."""
        return Effect.ROUNDING

    def run(self, model: Model, context: Context) -> PassResult:
        """Fuse in all bodies."""
        return rewrite(model, [_MatmulAdd()], context)


class _MatmulAdd(Rule):
    """x w + b = Gemm(x, w, b)."""

    pattern = op("Add", op("MatMul|Gemm", x, w, name="product"), b)
    done = "fused"

    def check(self, found: Match, view: View) -> str | None:
        product = found["product"].outputs[0]
        dtype, shape = view.dtype(found["x"]), view.shape(product)
        if view.opset(found.root) < 7 or view.rank(found["x"]) != 2 or view.rank(found["w"]) != 2 or dtype is None:
            return LOOKS_ALIKE
        if dtype.name not in ("float32", "float64", "float16") or view.dtype(found["b"]) != dtype:
            return LOOKS_ALIKE
        return None if spreads_over(view.shape(found["b"]), shape) else "what is added may not spread over the product"

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        product = found["product"]
        attrs = dict(product.attrs) if product.op == "Gemm" else {}
        return make("Gemm", found["x"], found["w"], found["b"], **attrs)
