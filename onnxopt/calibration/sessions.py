"""Sessions of an instrumented clone of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from onnxopt.calibration.bodies import BodyInstrument
from onnxopt.calibration.instrument import Instrument, Reading, Subject, Wanted
from onnxopt.calibration.plan import Shape, Tensor
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


@dataclass(frozen=True)
class Report:
    """What one run of one session gave.

    readings: (tensor, what was read, its value). inner: (tensor, minimum, maximum, sum of magnitudes, count) of inner
    bodies. guards: output of the model -> sum of magnitudes.
    """

    readings: Sequence[tuple[Tensor, Reading, Any]]
    inner: Sequence[tuple[Variable, float, float, float, int]] = ()
    guards: Mapping[Variable, float] | None = None


class Probe:
    """One session that reports what is asked.

    inner: tensors of inner bodies whose ranges are wanted too. guards: float outputs of the model, of which a sum is
    reported that spreads NaN. blocked: whether what the runtime keeps blocked is read in that layout.
    """

    def __init__(
        self,
        model: Model,
        asks: Sequence[Ask],
        *,
        inner: Sequence[Variable] = (),
        guards: Sequence[Variable] = (),
        blocked: bool = True,
        threads: int = 1,
    ) -> None:
        clone = model.clone()
        names = Names(clone.model)
        here = clone.tensors
        originals = {here[id(variable)]: variable for variable in inner}
        instrument = Instrument(clone.model, names)
        self._readings: list[tuple[Tensor, Reading]] = []
        for ask in asks:
            subject = ask.tensor.subject(here[id(ask.tensor.variable)], ask.shape, blocked)
            self._readings += [(ask.tensor, reading) for reading in instrument.measure(subject, ask.wanted)]
        # shapes that follow from those of the inputs need no reading once these have been seen
        self._fresh = [
            (tensor, reading)
            for tensor, reading in self._readings
            if reading.figure != "shape" or not tensor.determined
        ]
        self._guards: list[tuple[Variable, str]] = []
        for variable in guards:
            subject = Subject(here[id(variable)], None, None, False)
            self._guards += [(variable, reading.name) for reading in instrument.measure(subject, Wanted(total=True))]
        bodies = BodyInstrument(clone.model, originals, names)
        self._inner = [
            ([tensor.name for tensor in bundle], [originals[tensor] for tensor in tensors])
            for bundle, tensors in bodies.vectors
        ]
        for bundle, _ in bodies.vectors:
            instrument.expose(bundle)
        instrument.finish()
        self.empty = not clone.model.graph.outputs
        self._others = [name for names, _ in self._inner for name in names] + [name for _, name in self._guards]
        if not self.empty:
            self._session = Session(clone.model, threads=threads, name="the model under calibration")

    def run(self, inputs: Mapping[str, Any], *, seen: bool = False) -> Report:
        """Run the model once. seen: the shapes of these inputs were seen before. Raises PassError where it fails."""
        asked = self._fresh if seen else self._readings
        names = [reading.name for _, reading in asked] + self._others
        if self.empty or not names:
            return Report(())
        outputs = self._session.run(inputs, names)
        readings = [(tensor, reading, outputs[reading.name]) for tensor, reading in asked]
        inner: list[tuple[Variable, float, float, float, int]] = []
        for names, tensors in self._inner:
            vectors = [outputs[name].tolist() for name in names]
            inner += zip(tensors, *vectors, strict=True)
        return Report(readings, inner, {variable: float(outputs[name]) for variable, name in self._guards})
