"""What a rewritten model must say of itself as the original did: inputs, outputs, metadata, docs."""

from __future__ import annotations

from typing import Any

from onnx import ModelProto


def other_signature(before: ModelProto, after: ModelProto) -> str:
    """In words, how inputs or outputs differ; "" if they don't. Initializers listed as inputs before IR 4 are none."""
    for side in ("input", "output"):
        old, new = _ports(before, side), _ports(after, side)
        if [info.name for info in old] != [info.name for info in new]:
            return f"{side}s were {[info.name for info in old]} and are {[info.name for info in new]}"
        changed = [info.name for info, other in zip(old, new, strict=True) if info != other]
        if changed:
            return f"{side}s are described differently: {changed}"
    return ""


def _ports(model: ModelProto, side: str) -> list[Any]:
    if side == "output" or model.ir_version >= 4:
        return list(getattr(model.graph, side))
    graph = model.graph
    constant = {tensor.name for tensor in graph.initializer} | {each.values.name for each in graph.sparse_initializer}
    return [info for info in graph.input if info.name not in constant]


def lost_metadata(before: ModelProto, after: ModelProto) -> str:
    """In words, what the model, its main graph or a node that is still there lost; "" if nothing."""
    fields = ("producer_name", "producer_version", "domain", "model_version", "doc_string", "metadata_props")
    lost = [name for name in (*fields, "training_info") if getattr(before, name) != getattr(after, name)]
    lost += [
        f"graph.{name}"
        for name in ("name", "doc_string", "metadata_props")
        if getattr(before.graph, name) != getattr(after.graph, name)
    ]
    domains = [{entry.domain for entry in model.opset_import} for model in (before, after)]
    lost += [f"import of {domain!r}" for domain in domains[0] - domains[1]]
    if after.ir_version < before.ir_version:
        lost.append("ir_version")
    there = {(node.op_type, *node.output): node for node in after.graph.node}
    for node in before.graph.node:
        other = there.get((node.op_type, *node.output))
        for name in ("name", "doc_string", "metadata_props"):
            if other is not None and getattr(other, name) != getattr(node, name):
                lost.append(f"{name} of {node.op_type} {node.output[0]}")
    return ", ".join(lost)
