"""Sessions of an instrumented clone of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from onnxopt.calibration.bodies import BodyInstrument
from onnxopt.calibration.instrument import Instrument, Reading, Wanted
from onnxopt.calibration.plan import Plan, Shape, Tensor
from onnxopt.graph.names import Names
from onnxopt.model import Model, Variable
from onnxopt.runtime import Session

Signature: TypeAlias = tuple[tuple[str, Any], ...]


def signature_of(inputs: Mapping[str, Any]) -> Signature:
    """The shapes of all inputs."""
    return tuple((name, _dims(value)) for name, value in sorted(inputs.items()))


def _dims(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_dims(item) for item in value)
    return getattr(value, "shape", None)


@dataclass(frozen=True)
class Ask:
    """What one session reports of one tensor. shape: that of a sample, where one is known."""

    tensor: Tensor
    wanted: Wanted
    shape: Shape | None = None

    @property
    def bytes(self) -> int:
        """What the session hands over of a tensor of this shape."""
        return 4 * math.prod(self.shape or ()) if self.wanted.whole else 0


@dataclass(frozen=True)
class Report:
    """What one run of one session gave.

    readings: (tensor, what was read, its value). tensors: all that they are of. shapes: those not seen before.
    inner: (tensor, minimum, maximum, sum of magnitudes, count) of inner bodies.
    """

    readings: Sequence[tuple[Tensor, Reading, Any]]
    tensors: frozenset[Tensor] = frozenset()
    shapes: Mapping[Tensor, Shape] = field(default_factory=dict)
    inner: Sequence[tuple[Variable, float, float, float, int]] = ()


class Probe:
    """One session that reports what is asked, and computes all tensors of the plan as every other does.

    inner: whether it reports the ranges of the tensors in inner bodies. blocked: whether what the runtime keeps blocked
    is read in that layout. whole: the tensors that it hands over whole.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        asks: Sequence[Ask],
        *,
        inner: bool = True,
        blocked: bool = True,
        threads: int = 1,
    ) -> None:
        clone = model.clone()
        names = Names(clone.model)
        here = clone.tensors
        for variable, dtype in plan.dtypes.items():
            here[id(variable)].dtype = dtype
        originals = {here[id(variable)]: variable for variable in plan.inner}
        instrument = Instrument(clone.model, names)
        self._forms = {ask.tensor: ask.tensor.form(ask.shape) for ask in asks if ask.shape is not None}
        self.whole = [ask.tensor for ask in asks if ask.wanted.whole]
        self._readings: list[tuple[Tensor, Reading]] = []
        for ask in asks:
            subject = ask.tensor.subject(here[id(ask.tensor.variable)], ask.shape, blocked)
            self._readings += [(ask.tensor, reading) for reading in instrument.measure(subject, ask.wanted)]
        self._tensors = frozenset(tensor for tensor, _ in self._readings)
        # shapes that follow from those of the inputs need no reading once these have been seen
        self._fresh = [
            (tensor, reading)
            for tensor, reading in self._readings
            if reading.figure != "shape" or not tensor.determined
        ]
        bodies = BodyInstrument(clone.model, originals, names)
        for bundle, _ in bodies.vectors:
            instrument.expose(bundle)
        self._inner = [
            ([tensor.name for tensor in bundle], [originals[tensor] for tensor in tensors])
            for bundle, tensors in bodies.vectors
            if inner
        ]
        instrument.finish()
        self._others = [name for names, _ in self._inner for name in names]
        self._session = Session(clone.model, threads=threads, one_block=False, name="the model under calibration")

    def run(self, inputs: Mapping[str, Any], *, seen: bool = False) -> Report:
        """Run the model once. seen: the shapes of these inputs were seen before. Raises PassError where it fails."""
        asked = self._fresh if seen else self._readings
        names = [reading.name for _, reading in asked] + self._others
        outputs = self._session.run(inputs, names or None)
        readings = [(tensor, reading, outputs[reading.name]) for tensor, reading in asked]
        shapes = {
            tensor: tuple(outputs[reading.name].tolist()) if reading.figure == "shape" else outputs[reading.name].shape
            for tensor, reading in asked
            if reading.shaped and not (seen and tensor.determined)
        }
        inner: list[tuple[Variable, float, float, float, int]] = []
        for names, tensors in self._inner:
            vectors = [outputs[name].tolist() for name in names]
            inner += zip(tensors, *vectors, strict=True)
        return Report(readings, self._tensors, shapes, inner)

    def fits(self, report: Report) -> bool:
        """Whether the tensors of a sample have the form that the session was made for."""
        return all(
            self._forms.get(tensor, len(shape)) == (tensor.form(shape) if 0 in shape else len(shape))
            for tensor, shape in report.shapes.items()
        )
