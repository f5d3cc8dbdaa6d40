"""What the passes of one kind have in common: their options, and how these become the settings of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from onnxopt.calibration import CALIBRATORS, Requests
from onnxopt.errors import UsageError, did_you_mean
from onnxopt.graph.selection import Selection
from onnxopt.model import Model
from onnxopt.passbase import Context, Effect, Pass, PassResult, option
from onnxopt.quantization import static, weight_store
from onnxopt.quantization.weight_store import Storing
from onnxopt.target import Target


@dataclass(frozen=True)
class StaticPass(Pass):
    """A pass on the engine of static codes. Subclasses say more in `settings`."""

    storage: bool = option(True, "store weights that no integer kernel serves as int8")
    correct_bias: bool = option(True, "take the mean error of rounded weights out of the bias")
    feedback: bool = option(False, "round weights so that, on the inputs seen, errors make good for each other")
    calibrator: tuple[str, ...] = option(
        ("minmax",), f"how ranges are chosen, of several the one that does best: {', '.join(CALIBRATORS)}"
    )
    min_sqnr: float = option(3.0, "dB of typical values over rounding noise that a layer needs")
    all_layers: bool = option(False, "quantize layers too whose conversions cost more than their integer kernel saves")
    fallback: bool = option(True, "leave layers float, worst first, until the budgets on quality hold")
    aim: float = option(0.0, "dB that outputs must reach; layers are left float until they do", minimum=0.0)
    only: tuple[str, ...] = option((), "names or patterns of the layers that may be quantized; default all")
    exclude: tuple[str, ...] = option((), "names or patterns of nodes that stay as they are")

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = next((name for name in self.calibrator if name not in CALIBRATORS), None)
        if unknown is not None:
            raise UsageError(f"pass {self.name!r}: unknown calibrator {unknown!r}", did_you_mean(unknown, CALIBRATORS))
        if not self.calibrator:
            raise UsageError(f"pass {self.name!r}: no calibrator is named", f"use one of: {', '.join(CALIBRATORS)}")

    @property
    def effect(self) -> Effect:
        """Lossy, always."""
        return Effect.LOSSY

    @property
    def settings(self) -> static.Settings:
        """What the engine is told."""
        return static.Settings(
            storage=self.storage,
            correct_bias=self.correct_bias,
            calibrators=self.calibrator,
            min_sqnr=self.min_sqnr,
            all_layers=self.all_layers,
            feedback=self.feedback,
            selection=Selection(self.only, self.exclude),
            fallback=self.fallback,
            aim=self.aim,
        )

    def needs(self, model: Model) -> Requests:
        """Ranges of every tensor that may carry codes; channel means of layer inputs in the main graph."""
        return static.requests(model, self.settings)

    def run(self, model: Model, context: Context) -> PassResult:
        """Quantize the layers that have statistics and pay; store the other weights."""
        self.settings.selection.check(model, self.name)
        return static.quantize(model, context, self.settings)


@dataclass(frozen=True)
class WeightPass(Pass):
    """A pass on the engine of stored weights. Subclasses say how in `storing`."""

    correct_bias: bool = option(True, "take the mean error of rounded weights out of the bias")
    only: tuple[str, ...] = option((), "names or patterns of the nodes whose weights may be stored; default all")
    exclude: tuple[str, ...] = option((), "names or patterns of nodes that stay as they are")

    @property
    def effect(self) -> Effect:
        """Lossy, always."""
        return Effect.LOSSY

    def storing(self, target: Target | None) -> Storing:
        """What the engine is told for a target; None while only statistics are asked for, which hang on no target."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it stores weights")

    def needs(self, model: Model) -> Requests:
        """Second moments of what weights in blocks multiply; channel means of inputs of layers with a bias."""
        return weight_store.requests(model, self.storing(None), self._selection)

    def run(self, model: Model, context: Context) -> PassResult:
        """Store what pays."""
        self._selection.check(model, self.name)
        return weight_store.store(model, context, self.storing(context.target), self._selection)

    @property
    def _selection(self) -> Selection:
        return Selection(self.only, self.exclude)
