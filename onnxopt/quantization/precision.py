"""Layers whose output is needed to a relative accuracy that 8 bits of the whole range can't give."""

from __future__ import annotations

from onnxopt.model import Constant, Model, Node
from onnxopt.quantization import qdq

# A logarithm turns the constant step of integer codes into errors that grow without bound towards zero.
_RELATIVE = frozenset({"Log"})
# Behind these, absolute errors of the input are bounded relative errors of the output: log(softmax), log(1 + exp).
_SETTLED = frozenset({"Exp", "Softmax", "LogSoftmax", "Sigmoid", "Softplus"})


def before_logarithms(model: Model) -> set[Node]:
    """Layers from which a logarithm is reached without passing another layer: magnitudes of spectra, energies."""
    found: set[Node] = set()
    pending = [node for body in model.bodies() for node in body.nodes if node.kind[0] == "" and node.op in _RELATIVE]
    seen = set(pending)
    while pending:
        for tensor in pending.pop().inputs:
            if isinstance(tensor, Constant):
                continue
            for producer in tensor.inputs:
                if producer in seen:
                    continue
                seen.add(producer)
                row = qdq.row(producer)
                if row is not None and row.role is qdq.Role.LAYER:
                    found.add(producer)
                elif producer.op not in _SETTLED:
                    pending.append(producer)
    return found
