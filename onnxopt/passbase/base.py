"""Pass, its options, and passes made of plain functions."""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_type_hints

from onnxopt.errors import UsageError, did_you_mean
from onnxopt.passbase.observe import Observation
from onnxopt.passbase.result import Change, Context, PassResult, Skip

if TYPE_CHECKING:
    from onnxopt.calibration import Requests
    from onnxopt.model import Graph, Model
    from onnxopt.target import Target

T = TypeVar("T")


@enum.unique
class Effect(enum.Enum):
    """What a configured pass may do to outputs."""

    EXACT = "exact"  # bit-equal without graph optimization, one thread
    ROUNDING = "rounding"  # re-association: 1e-5 of the largest output
    LOSSY = "lossy"  # measured, and held against budgets


def option(
    default: T,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> T:
    """A field of a pass that the command line can set: its default, one line of help, and what values it takes."""
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Pass:
    """One rewrite. Subclasses are frozen dataclasses whose fields (`option`) are the pass's options.

    The first line of a subclass's docstring is its help. `prepare` names passes that the pipeline inserts before it,
    as in a pass list: "convert_opset:opset=19".
    Option values are checked on construction; a wrong one raises UsageError.
    """

    name: ClassVar[str] = ""
    prepare: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check(self.name, item, getattr(self, item.name))

    @property
    def effect(self) -> Effect:
        """What this configured pass may do to outputs."""
        raise NotImplementedError(f"{type(self).__name__} states no effect")

    def for_target(self, target: Target) -> Pass:
        """The same pass with what its options leave to the target decided; `needs` is asked of this one."""
        return self

    def needs(self, model: Model) -> Requests | None:
        """Statistics of `model` wanted in the context, gathered in one run over the feeds. None: no statistics."""
        return None

    def run(self, model: Model, context: Context) -> PassResult:
        """Rewrite `model` in place. Raises what it will: the pipeline rolls back and names the pass."""
        raise NotImplementedError(f"{type(self).__name__} has no run")

    @classmethod
    def help(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().split("\n")[0]

    @classmethod
    def options(cls) -> tuple[dataclasses.Field[Any], ...]:
        """The option fields, in order."""
        return dataclasses.fields(cls)

    @classmethod
    def parse(cls, settings: dict[str, str]) -> Pass:
        """Build the pass from option texts. Raises UsageError naming the pass, the option and what it takes."""
        known = {item.name: item for item in cls.options()}
        hints = get_type_hints(cls)
        values: dict[str, Any] = {}
        for key, text in settings.items():
            if key not in known:
                raise UsageError(f"pass {cls.name!r} has no option {key!r}", did_you_mean(key, known))
            values[key] = _parse(cls.name, key, text, hints[key])
        return cls(**values)

    def __str__(self) -> str:
        parts = [self.name]
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value != item.default:
                parts.append(f"{item.name}={_print(value)}")
        return ":".join(parts)


def _check(name: str, item: dataclasses.Field[Any], value: Any) -> None:
    low, high = item.metadata.get("minimum"), item.metadata.get("maximum")
    choices = item.metadata.get("choices")
    where = f"pass {name!r}, option {item.name!r}"
    if choices is not None and value not in choices:
        raise UsageError(f"{where}: {value!r} is not among its values", f"use one of: {', '.join(choices)}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if not (value == value and (low is None or value >= low) and (high is None or value <= high)):
        if low is None and high is None:
            raise UsageError(f"{where}: {value} is no number", "use a finite number")
        limits = f"from {low}" if high is None else f"up to {high}" if low is None else f"{low} to {high}"
        raise UsageError(f"{where}: {value} is out of range", f"use a value {limits}")


def _parse(name: str, key: str, text: str, hint: Any) -> Any:
    kinds = hint.__args__ if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        try:
            if kind is bool:
                return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
            if kind in (int, float, str):
                return kind(text)
            if getattr(kind, "__origin__", None) is tuple:
                return tuple(kind.__args__[0](word) for word in text.split("+") if word)
        except (KeyError, ValueError):
            continue
    wanted = " or ".join(
        {bool: "true or false", int: "a whole number", float: "a number"}.get(k, str(k)) for k in kinds
    )
    raise UsageError(f"pass {name!r}, option {key!r}: {text!r} is not {wanted}", f"run: onnxopt passes {name}")


def _print(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def rewrite(
    *, name: str, effect: str | Effect, prepare: tuple[str, ...] = ()
) -> Callable[[Callable[[Graph], None]], type[Pass]]:
    """Make a pass of a function that edits one graph in place.

    The function is called for the main graph and every If, Loop and Scan body, not for local functions. Nodes it
    removed, added and changed, and constants it gave other values, are reported as changes.
    """
    wanted = Effect(effect)

    def decorate(function: Callable[[Graph], None]) -> type[Pass]:
        def run(_self: Pass, model: Model, _context: Context) -> PassResult:
            changes: list[Change] = []
            for body in list(model.bodies()):
                if body.function is not None:
                    continue
                before = Observation(body)
                function(body)
                changes += before.changes()
            return PassResult(changes)

        members: dict[str, Any] = {
            "__doc__": function.__doc__,
            "__module__": function.__module__,
            "name": name,
            "prepare": prepare,
            "effect": property(lambda _self: wanted),
            "run": run,
        }
        return dataclass(frozen=True)(type(function.__name__, (Pass,), members))

    return decorate


__all__ = ["Change", "Context", "Effect", "Pass", "PassResult", "Skip", "option", "rewrite"]
