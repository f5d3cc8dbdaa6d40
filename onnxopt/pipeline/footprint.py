"""What original and result take: compressed files, memory of the loaded model, time of loading."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from onnxopt.errors import LimitError, OnnxoptError
from onnxopt.model import Model
from onnxopt.model import files as model_files
from onnxopt.pipeline.compressed import Packed, Packing
from onnxopt.pipeline.facts import sidecars
from onnxopt.pipeline.figures import load_figures, memory_figures
from onnxopt.pipeline.settings import Settings
from onnxopt.report import FootprintFigures, ModelFacts, SizeFigures
from onnxopt.report.quantities import size as in_words
from onnxopt.runtime.latency import Latency
from onnxopt.runtime.loads import DEFAULT_SECONDS, LoadMeter, Loads, Memory
from onnxopt.verification import Budget, Measured

# larger files are compressed when asked for: it would take seconds
COMPRESS_UP_TO = 64 << 20
# where nothing is timed, memory alone is worth a process of its own from so many bytes of weights on
SMALL = 1 << 20
# of a file in a temporary folder; a model names its sidecar after itself
UNNAMED = "model.onnx"
_TOO_LARGE = "larger than 2 GB and not written yet: onnxopt check measures it"
# kinds of budgets -> the figure of the report
BUDGETS = {"max_compressed": "zip", "max_memory": "memory", "max_load": "load"}


@dataclass(frozen=True)
class Footprint:
    """What was found. sizes: file bytes of (reference, candidate); unmeasured: figure of the report -> why."""

    sizes: tuple[int, int]
    packed: tuple[Packed, Packed] | None = None
    memory: Memory | None = None
    load: Latency | None = None
    unmeasured: dict[str, str] = field(default_factory=dict)

    def measured(self) -> Measured:
        """For the budgets."""
        return Measured(
            sizes=self.sizes,
            compressed=self._both("deflate"),
            memory=self.memory,
            load=self.load,
            unmeasured={kind: self.unmeasured[figure] for kind, figure in BUDGETS.items() if figure in self.unmeasured},
        )

    def figures(self) -> FootprintFigures:
        """For the report."""
        deflate, zstd = self._both("deflate") or (None, None), self._both("zstd") or (None, None)
        reference, candidate = (SizeFigures(self.sizes[at], deflate[at], zstd[at]) for at in (0, 1))
        return FootprintFigures(
            reference=reference,
            candidate=candidate,
            memory=memory_figures(self.memory) if self.memory is not None else None,
            load=load_figures(self.load) if self.load is not None else None,
            unmeasured=self.unmeasured,
        )

    def _both(self, form: str) -> tuple[int, int] | None:
        if self.packed is None:
            return None
        one, two = (getattr(packed, form) for packed in self.packed)
        return None if one is None or two is None else (one, two)


def with_footprint(
    reference: ModelFacts, candidate: ModelFacts, footprint: FootprintFigures | None
) -> tuple[ModelFacts, ModelFacts, FootprintFigures | None]:
    """All three with each other's figures: of the facts the compressed bytes, of the footprint those of the files."""
    if footprint is None:
        return reference, candidate, None
    one, two = footprint.reference, footprint.candidate
    return (
        replace(reference, compressed_bytes=one.deflate_bytes),
        replace(candidate, compressed_bytes=two.deflate_bytes),
        replace(footprint, candidate=replace(two, file_bytes=candidate.file_bytes)),
    )


_FIGURES = 4  # zip, zstd, memory, load


class FootprintMeter:
    """Measures the footprint of original and result. Its files, threads and processes are gone when the block ends.

    The original is compressed from the start where it has a file. budgets: those of the run; what they limit is
    measured whatever it costs.
    """

    def __init__(self, reference: Model, path: Path | None, settings: Settings, budgets: tuple[Budget, ...]) -> None:
        self._reference, self._settings = reference, settings
        self._asked = {BUDGETS[budget.kind] for budget in budgets if budget.kind in BUDGETS}
        if settings.compressed:
            self._asked.add("zip")
        self._held = ExitStack()
        self._packing = self._held.enter_context(Packing())
        self._files: list[Path] = []
        self._packed: list[Future[Packed]] = []
        self._meter: LoadMeter | None = None
        self._unmeasured: dict[str, str] = {}
        if not settings.verify and not self._asked:
            self._miss("zip", "zstd", "memory", "load", why="nothing is measured (--no-verify)")
        elif path is not None:
            self._take(path, sidecars(path))

    def __enter__(self) -> FootprintMeter:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._held.close()

    @property
    def asked(self) -> bool:
        """Whether figures are wanted of a result that did not change, too."""
        return bool(self._asked)

    def add(self, candidate: Model, path: Path | None = None, *, name: str = UNNAMED, loads: bool = True) -> None:
        """The result, of which `path` is the file, or `name` will be. loads: whether both may be loaded.

        Returns while files are still compressed and a process to load them starts, so that other work can go on.
        """
        if len(self._unmeasured) == _FIGURES:
            return
        try:
            if not self._files:
                self._write(self._reference, UNNAMED)
            if path is not None:
                self._take(path, sidecars(path))
            else:
                self._write(candidate, name)
        except OnnxoptError as error:
            self._miss("zip", "zstd", "memory", "load", why=error.cause)
            return
        if not loads:
            self._miss("memory", "load", why="nothing was compared")
        elif self._asked & {"memory", "load"} or self._settings.latency_seconds or self._reference.nbytes() >= SMALL:
            settings = self._settings
            self._meter = self._held.enter_context(LoadMeter(threads=settings.threads, timeout=settings.timeout))
        else:
            self._miss("memory", "load", why="timing is off, and so small a model is loaded for that only")

    def settle(self) -> None:
        """Return when nothing of it runs, so that the caller may time something."""
        self._packing.settle()
        if self._meter is not None:
            self._meter.wait_until_ready()

    def measure(self, sizes: tuple[int, int]) -> Footprint:
        """What was found. sizes: file bytes of (reference, candidate). Loads both models, with nothing else running."""
        self.settle()
        packed = self._compressed()
        loads = self._loads()
        timed = loads is not None and self._settings.latency_seconds > 0
        return Footprint(
            sizes=sizes,
            packed=packed,
            memory=loads.memory if loads is not None else None,
            load=loads.time if loads is not None and timed else None,
            unmeasured=self._unmeasured,
        )

    def _take(self, file: Path, beside: Iterable[Path]) -> None:
        """One of the two models, as a file and those beside it: compress them, unless that takes too long."""
        self._files.append(file)
        files = [file, *beside]
        size = sum(part.stat().st_size for part in files)
        if "zip" in self._unmeasured:
            return
        if size <= COMPRESS_UP_TO or "zip" in self._asked:
            self._packed.append(self._packing.begin(files))
        else:
            self._packing.stop()
            self._miss("zip", "zstd", why=f"{in_words(size)}; ask with --compressed")

    def _write(self, model: Model, name: str) -> None:
        """Take a file of the model, as the run would write it. Raises OnnxoptError where there is no room for one."""
        if model.nbytes() > model_files.INLINE_LIMIT:
            raise LimitError(_TOO_LARGE, "")
        place = self._held.enter_context(tempfile.TemporaryDirectory(prefix="onnxopt-", ignore_cleanup_errors=True))
        file = model.save(Path(place) / name, external_data=self._settings.external_data)
        self._take(file, [other for other in file.parent.iterdir() if other != file])

    def _compressed(self) -> tuple[Packed, Packed] | None:
        if "zip" in self._unmeasured:
            return None
        try:
            one, two = (future.result() for future in self._packed)
        except OSError as error:
            self._miss("zip", "zstd", why=f"{error.filename} can't be read: {error.strerror}")
            return None
        if one.why_no_zstd:
            self._miss("zstd", why=one.why_no_zstd)
        return one, two

    def _loads(self) -> Loads | None:
        if self._meter is None:
            return None
        seconds = DEFAULT_SECONDS if self._settings.latency_seconds else 0.0
        if "load" in self._asked:
            seconds = self._settings.latency_seconds
        try:
            loads = self._meter.measure(self._files[0], self._files[1], seconds=seconds)
        except OnnxoptError as error:
            self._miss("memory", "load", why=error.cause)
            return None
        if loads.memory is None:
            self._miss("memory", why="this system does not tell it")
        if not self._settings.latency_seconds:
            self._miss("load", why="timing is off")
        return loads

    def _miss(self, *figures: str, why: str) -> None:
        for figure in figures:
            self._unmeasured.setdefault(figure, why)
