"""int8 beside onnxruntime's own static quantization: task metric, file bytes, latency.

    python -m benchmarks.int8 --zoo DIR [--models DIR] [NAME ...] [--samples 64] [--seconds 4] [--option KEY=VALUE]

Columns: the task's metric; file bytes and latency over the float model's (latency: median of interleaved runs, one
thread). Rivals: `quantize_static` with U8 activations, S8 per-channel weights and min-max after `quant_pre_process`,
full range (u8s8) and with reduce_range (7 bit). Models below operator set 13 are converted to 17 first for them.
Both calibrate on the same samples. --option sets an option of the pass, --target its target.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx

from benchmarks.tasks import add_arguments, found_models, load_tasks
from onnxopt.calibration import collect
from onnxopt.feeds import Sample
from onnxopt.model import load
from onnxopt.passbase import Context, lookup
from onnxopt.pipeline.passes import evaluate
from onnxopt.runtime import Session
from onnxopt.runtime.latency import measure
from onnxopt.target import resolve


def ours(path: Path, out: Path, samples: list[Sample], target: str, options: dict[str, str]) -> list[str]:
    """Quantize with the int8 pass and what prepares it; returns its notes."""
    model = load(path)
    int8 = lookup("int8")
    quantize = int8.parse(options)
    for name in int8.prepare:
        lookup(name)().run(model, Context(evaluate=evaluate))
        model.normalize()
    requests = quantize.needs(model)
    statistics = None if requests is None else collect(model, requests, samples)
    context = Context(statistics=statistics, target=resolve(target), evaluate=evaluate)
    notes = list(quantize.run(model, context).notes)
    model.save(out)
    return notes


def rival(path: Path, out: Path, samples: list[Sample], reduce_range: bool) -> None:
    """onnxruntime's recipe: QDQ, U8 activations, S8 per-channel weights, min-max."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([sample.inputs for sample in samples])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        proto = onnx.load(path)
        if next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")) < 13:
            proto = onnx.version_converter.convert_version(proto, 17)
        source, ready = Path(folder, "source.onnx"), Path(folder, "ready.onnx")
        onnx.save(proto, source)
        try:
            quant_pre_process(str(source), str(ready))
        except Exception:  # noqa: BLE001  symbolic shape inference fails on some models; onnxruntime's advice is to skip it
            quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
        quantize_static(
            str(ready),
            str(out),
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=reduce_range,
        )


def row(tasks: Any, name: str, path: Path, args: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The cells of one model, as they are measured."""
    task = tasks.load(name)
    feeds = itertools.islice(task.calib_feeds(), args.samples)
    samples = [Sample(feed, None, f"calibration sample {i}") for i, feed in enumerate(feeds)]
    timed = list(itertools.islice(task.feeds(), 8))
    yield f"{name:22} {task.primary:14} {task.run(path)[task.primary]:7.4f}"
    makers: dict[str, Callable[[Path], object]] = {
        "ours": lambda out: ours(path, out, samples, args.target, dict(args.option)),
        "u8s8": lambda out: rival(path, out, samples, False),
        "7bit": lambda out: rival(path, out, samples, True),
    }
    built: dict[str, Path] = {}
    for kind, make in makers.items():
        if kind not in args.only:
            continue
        out = folder / f"{name}.{kind}.onnx"
        started = time.perf_counter()
        try:
            make(out)
            scores = task.run(out)
            speed = measure(Session(path), Session(out), timed, seconds=args.seconds).ratio
        except Exception as error:  # noqa: BLE001  one failing recipe must not end the table
            yield f" | {kind}: {type(error).__name__} {str(error)[:60]}"
            continue
        built[kind] = out
        seconds = time.perf_counter() - started
        size = out.stat().st_size / path.stat().st_size
        more = f" nll {scores['nll']:.4f}" if "nll" in scores else ""
        yield f" | {kind} {scores[task.primary]:7.4f}{more} {size:.2f} bytes {speed:.2f}x ({seconds:.0f} s)"
    if "ours" in built and "u8s8" in built:
        against = measure(Session(built["u8s8"]), Session(built["ours"]), timed, seconds=args.seconds)
        yield f" | ours / u8s8 {against.ratio:.2f}x [{against.low:.2f}, {against.high:.2f}]"


def main() -> int:
    """Print one row a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds of timing per pair")
    parser.add_argument("--target", default="auto")
    parser.add_argument("--option", action="append", default=[], type=lambda text: text.split("=", 1), metavar="K=V")
    parser.add_argument("--only", nargs="*", default=["ours", "u8s8", "7bit"], help="which of ours, u8s8, 7bit")
    parser.add_argument("--keep", type=Path, help="folder for the quantized models")
    args = parser.parse_args()
    tasks = load_tasks(args.zoo, args.models)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in found_models(tasks, args.names):
            for cell in row(tasks, name, path, args, folder):
                print(cell, end="", flush=True)
            print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
