"""Everything one run knows, as data. Text and JSON are views of it.

Units: bytes, seconds unless a name says ms, decibels for SQNR, shares from 0 to 1 for agreement.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from onnxopt.passbase import Change, Skip

SCHEMA_VERSION = "1"


@enum.unique
class Verdict(enum.Enum):
    """What a run concludes, in the words that its report ends with."""

    PASSED = "passed"
    SYNTHETIC = "passed on synthetic inputs"
    UNCHANGED = "unchanged"
    NOT_VERIFIED = "not verified"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    ERROR = "error"


@enum.unique
class Status(enum.Enum):
    """What became of one pass of the pipeline."""

    CHANGED = "changed"
    UNCHANGED = "unchanged"
    FAILED = "failed"
    # it only prepared for a pass that then had nothing to do
    UNDONE = "undone"


@dataclass(frozen=True)
class ModelFacts:
    """One model as it lies on disk or would lie there. sha256: of the model file, without sidecars.

    file_bytes: the file and its sidecars. compressed_bytes: as `SizeFigures.deflate_bytes`, None where not measured.
    """

    path: str | None
    sha256: str | None
    file_bytes: int
    compressed_bytes: int | None
    parameters: int
    nodes: int
    opset: int
    ir_version: int


@dataclass(frozen=True)
class OutputFigures:
    """One output of two models on the same feeds.

    differing: elements of which a bit differs. max_abs: largest |difference|; max_rel: that over the largest |value| of
    the reference. agreement: share of equal elements for integers, bools and strings. argmax_agreement: share of rows
    whose largest entry is the same one, for outputs that may be class scores. Figures that mean nothing for the element
    type are None. problem: why the output fails its rule, None where it passes.
    """

    name: str
    dtype: str
    elements: int
    differing: int
    max_abs: float | None = None
    max_rel: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    agreement: float | None = None
    argmax_agreement: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class ComparisonFigures:
    """Two models side by side. against: what the reference was. rule: what the outputs were held to."""

    against: str
    rule: str
    samples: int
    outputs: tuple[OutputFigures, ...]


@dataclass(frozen=True)
class MetricFigures:
    """A task metric of both models on the evaluation feeds. drop: positive where the candidate is worse.

    share: it lies between 0 and 1, and a point ("pt") is a hundredth of it.
    """

    name: str
    reference: float
    candidate: float
    drop: float
    higher_is_better: bool
    share: bool
    samples: int


@dataclass(frozen=True)
class LatencyFigures:
    """Interleaved timing of `pairs` rounds, each of which runs both models and gives one ratio candidate / reference.

    ratio: the median of the rounds' ratios, not the ratio of the medians, with its 95 % interval from `low` to `high`.
    """

    ratio: float
    low: float
    high: float
    pairs: int
    reference_ms: float
    candidate_ms: float
    threads: int


@dataclass(frozen=True)
class SizeFigures:
    """Bytes of one model's files, sidecars included, and of each of them compressed. None: not measured.

    deflate_bytes: level 6, as zip and gzip do. zstd_bytes: Zstandard, level 3.
    """

    file_bytes: int
    deflate_bytes: int | None = None
    zstd_bytes: int | None = None


@dataclass(frozen=True)
class MemoryFigures:
    """Bytes that a process holds more of once it has loaded each model; the runtime itself is not counted.

    Medians over `loads` loads of each, every one in a process of its own. noise_bytes: a difference up to it says
    nothing of the models. 0 loads: a report of an earlier version, which does not tell.
    """

    reference_bytes: int
    candidate_bytes: int
    noise_bytes: int = 0
    loads: int = 0


@dataclass(frozen=True)
class LoadFigures:
    """Interleaved timing of loading both files, as `LatencyFigures` is of running them. The files are in the cache.

    Below six pairs the interval holds all of the ratios.
    """

    ratio: float
    low: float
    high: float
    pairs: int
    reference_ms: float
    candidate_ms: float


@dataclass(frozen=True)
class FootprintFigures:
    """What original and result take where they are kept, sent and loaded. unmeasured: figure -> why it is None.

    Figures are "zip", "zstd", "memory" and "load".
    """

    reference: SizeFigures
    candidate: SizeFigures
    memory: MemoryFigures | None = None
    load: LoadFigures | None = None
    unmeasured: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BudgetFigures:
    """A limit on a measured figure, and what was measured. passed: None where it could not be decided."""

    name: str
    limit: str
    measured: str
    passed: bool | None
    detail: str = ""


@dataclass(frozen=True)
class ErrorFacts:
    """An error as it was told: one line of cause, one of remedy."""

    cause: str
    remedy: str


@dataclass(frozen=True)
class PassRecord:
    """What one pass of the pipeline did.

    text: the pass with its options, as in a pass list. inserted_for: the pass it prepares the model for, None where the
    user listed it. seconds: the pass itself; verify_seconds: proving it.
    """

    name: str
    text: str
    effect: str
    status: Status
    inserted_for: str | None = None
    changes: tuple[Change, ...] = ()
    skipped: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()
    error: ErrorFacts | None = None
    nodes_before: int = 0
    nodes_after: int = 0
    parameters_before: int = 0
    parameters_after: int = 0
    seconds: float = 0.0
    verify_seconds: float = 0.0
    comparison: ComparisonFigures | None = None


@dataclass(frozen=True)
class FeedFacts:
    """Where inputs came from, and how many samples served which purpose."""

    note: str
    synthetic: bool
    fit: int
    select: int
    evaluate: int
    fingerprint: str


@dataclass(frozen=True)
class UnfusedLayer:
    """A quantized layer that the runtime computes on floats all the same. operator: its type, as "Conv"."""

    name: str
    operator: str
    reason: str


@dataclass(frozen=True)
class KernelFigures:
    """What onnxruntime makes of the quantized layers, counted in the graph that it optimizes, inner bodies included.

    layers: quantized ones in the result. integer: those of them that an integer kernel runs; `unfused` are the others.
    kernels: integer kernels of layers and of what stands between them, by operator. float_layers: layers that nobody
    quantized, or whose stored weight is folded to floats when the model is loaded. between_codes: other operators that
    run on floats between a DequantizeLinear and a QuantizeLinear. quantize_nodes, dequantize_nodes: those left.
    """

    layers: int
    integer: int
    kernels: dict[str, int]
    unfused: tuple[UnfusedLayer, ...] = ()
    float_layers: int = 0
    between_codes: tuple[str, ...] = ()
    quantize_nodes: int = 0
    dequantize_nodes: int = 0


@dataclass(frozen=True)
class LayerFigures:
    """How close a layer's tensor of the result is to the tensor of that name in the original, over all feeds.

    A pass that scales a tensor and takes the factor out behind it, as equalization does, makes that look like noise.
    sqnr_db: of the tensor; it includes what earlier layers did. input_db: the same of what the layer reads, None where
    the original has no such tensor.
    """

    name: str
    operator: str
    tensor: str
    sqnr_db: float
    input_db: float | None = None


@dataclass(frozen=True)
class SaturationRisk:
    """A layer whose weight codes can overflow a 16-bit pair sum on x86 without VNNI, for some input.

    largest_code: the largest activation code that occurred. reachable: whether the weights can overflow with codes up
    to that. outputs, differing: outputs that were computed both ways, and those that differ. None: not measured.
    """

    name: str
    operator: str
    largest_code: int | None = None
    reachable: bool | None = None
    outputs: int | None = None
    differing: int | None = None


@dataclass(frozen=True)
class SaturationFigures:
    """Products that saturate on x86 without VNNI. checked: layers of 8-bit codes whose weights were looked at.

    unread: layers whose weights could not be read. risks: the layers that can saturate. samples: feeds measured on.
    """

    checked: int
    unread: int = 0
    risks: tuple[SaturationRisk, ...] = ()
    samples: int = 0


@dataclass(frozen=True)
class QuantizationFigures:
    """What is known of a quantized result. A part is None where it was not measured; `notes` say why.

    layers: in the order of the graph; samples: feeds that they were measured on. unmeasured: quantized layers whose
    tensor the original does not have, or in another shape, and those in inner bodies. memory: that of the footprint.
    """

    kernels: KernelFigures | None = None
    saturation: SaturationFigures | None = None
    layers: tuple[LayerFigures, ...] = ()
    samples: int = 0
    unmeasured: int = 0
    memory: MemoryFigures | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """One run. command: "optimize" or "check"; passes_text: the pipeline in canonical form.

    reference_changes: what was changed of the file before the passes, in words; then the reference is the result.
    """

    command: str
    versions: dict[str, str]
    reference: ModelFacts
    candidate: ModelFacts | None
    verdict: Verdict
    reason: str
    exit_code: int
    passes_text: str = ""
    target: str = ""
    seed: int = 0
    threads: int = 1
    passes: tuple[PassRecord, ...] = ()
    feeds: FeedFacts | None = None
    comparison: ComparisonFigures | None = None
    metrics: tuple[MetricFigures, ...] = ()
    latency: LatencyFigures | None = None
    footprint: FootprintFigures | None = None
    quantization: QuantizationFigures | None = None
    budgets: tuple[BudgetFigures, ...] = ()
    warnings: tuple[str, ...] = ()
    error: ErrorFacts | None = None
    reference_changes: tuple[str, ...] = ()
    seconds: float = 0.0
    schema_version: str = field(default=SCHEMA_VERSION)

    @property
    def passed(self) -> bool:
        """Whether nothing failed; "unchanged" and "passed on synthetic inputs" count."""
        return self.exit_code == 0

    def to_json(self) -> str:
        """The report as JSON; `Report.from_json` reads it back to an equal one."""
        from onnxopt.report import json_view

        return json_view.dump(self)

    @staticmethod
    def from_json(text: str) -> Report:
        """Read a report that `to_json` wrote. Raises UsageError for anything else."""
        from onnxopt.report import json_view

        return json_view.load(text)

    def to_text(self) -> str:
        """The report for the eye, in 80 columns, without colours."""
        from onnxopt.report import text_view

        return text_view.plain(self)
