"""Passes tried on a copy of the model, unproven, for what they would win. Exact and rounding ones that need no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto

from onnxopt.model import Model
from onnxopt.passbase import Change, Context, PassResult, lookup, names, pass_list, pass_lists
from onnxopt.runtime import Session

# a model that holds more bytes is not rewritten for an estimate
LARGEST = 1 << 30


@dataclass(frozen=True)
class Trial:
    """What the last of some passes did to a copy. nodes, bytes: how many fewer there are. failed: why it did not."""

    changes: tuple[Change, ...] = ()
    nodes: int = 0
    bytes: int = 0
    failed: str = ""

    @property
    def count(self) -> int:
        """Changes, each as many as it stands for."""
        return sum(change.count for change in self.changes)


def installed(name: str) -> bool:
    """Whether there is such a pass, or such a list of passes."""
    return name in names() or name in pass_lists()


def _expanded(passes: Sequence[str]) -> list[str]:
    """The passes, lists of several replaced by their members."""
    return [each for name in passes for each in (pass_list(name) or (name,))]


def tried(model: Model, passes: Sequence[str]) -> Trial:
    """Run installed passes one after the other on a copy of the model; what the last one, or the last list, did."""
    if model.nbytes() > LARGEST:
        return Trial(failed=f"the model holds more than {LARGEST >> 30} GiB of weights")
    copy = model.clone().model
    try:
        for name in passes[:-1]:
            _run(name, copy, model)
        nodes, held = copy.node_count(), copy.nbytes()
        changes = [change for name in _expanded(passes[-1:]) for change in _run(name, copy, model).changes]
    except Exception as error:  # noqa: BLE001  a pass may raise anything; an estimate fails no inspection
        return Trial(failed=" ".join(f"{type(error).__name__}: {error}".split())[:200])
    return Trial(tuple(changes), nodes - copy.node_count(), held - copy.nbytes())


def folded(model: Model) -> Model | None:
    """A copy in which what no input reaches is computed; None where that fails."""
    if "fold_constants" not in names() or model.nbytes() > LARGEST:
        return None
    copy = model.clone().model
    try:
        _run("fold_constants", copy, model)
    except Exception:  # noqa: BLE001  as above
        return None
    return copy


def _run(name: str, copy: Model, model: Model) -> PassResult:
    result = lookup(name)().run(copy, Context(reference=model, evaluate=_evaluate))
    copy.normalize()
    return result


def _evaluate(proto: ModelProto, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    session = Session(proto.SerializeToString(), optimize=False, threads=1, name="a part of the model")
    return list(session.run(inputs).values())
