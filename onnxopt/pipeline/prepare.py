"""Which passes run, in which order, and which order is refused."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import replace

from onnxopt.errors import UsageError
from onnxopt.model import Model
from onnxopt.passbase import Effect, Pass
from onnxopt.pipeline.grammar import Step, parse
from onnxopt.quantization.coded import is_quantized


def with_prepared(steps: Sequence[Step]) -> list[Step]:
    """The steps with the passes that they name in `prepare` inserted before them, each at most once in the list.

    One that is named with options comes again unless it stands there with the same options. Rounding ones stand before
    the first lossy pass: behind it they would be refused (`check_order`).
    """
    done: list[Step] = []
    for step in steps:
        for text in _wanted(step.pass_, {step.source}):
            [wanted] = parse(text)
            there = [earlier for earlier in done if wanted.source in (earlier.source, earlier.pass_.name)]
            if not there or (text != wanted.source and all(str(earlier) != str(wanted) for earlier in there)):
                done.insert(_place(wanted.pass_, done), replace(wanted, inserted_for=step.source))
        done.append(step)
    return done


def _place(pass_: Pass, done: Sequence[Step]) -> int:
    lossy = (at for at, step in enumerate(done) if step.pass_.effect is Effect.LOSSY)
    return next(lossy, len(done)) if pass_.effect is Effect.ROUNDING else len(done)


def _wanted(pass_: Pass, above: set[str]) -> list[str]:
    """Texts in `prepare`, each after those that it wants itself. `above` guards against circles."""
    found: list[str] = []
    for text in pass_.prepare:
        [step] = parse(text)
        if step.source not in above:
            found += [*_wanted(step.pass_, above | {step.source}), text]
    return list(dict.fromkeys(found))


def still_wanted(steps: Iterable[Step], names: Container[str]) -> bool:
    """Whether a listed one of `steps` names one of the passes in what prepares for it."""
    listed = [step for step in steps if step.inserted_for is None]
    wanted = [parse(text)[0] for step in listed for text in _wanted(step.pass_, {step.source})]
    return any(step.source in names or step.pass_.name in names for step in wanted)


def quantized_nodes(model: Model) -> int:
    """How many nodes compute on quantized values or convert to or from them, in all bodies."""
    return sum(is_quantized(node) for body in model.bodies() for node in body.nodes)


def check_order(step: Step, model: Model, quantized_before: int) -> None:
    """Refuse a rounding pass on a model that an earlier pass has quantized.

    A change in the last bit before a QuantizeLinear may flip a whole quantization step, so the promise of `rounding`
    can't be held there. quantized_before: `quantized_nodes` of the original. Raises UsageError.
    """
    if step.pass_.effect is Effect.ROUNDING and quantized_nodes(model) > quantized_before:
        raise UsageError(
            f"pass {step.source!r} re-orders float arithmetic and stands after a pass that quantized the model",
            f"put {step.source} before the quantizing pass in --passes",
        )
