"""What one model holds, as data. Text and JSON are views of it. Units: bytes; shares from 0 to 1."""

from __future__ import annotations

from dataclasses import dataclass, field

SCHEMA_VERSION = "1"
Dim = int | str | None


@dataclass(frozen=True)
class TensorFacts:
    """An input or output. dtype: numpy's name, or the kind of what is no tensor ("sequence_type"), "" where unknown.

    dims: numbers, symbols, and None for lengths without a name; None where not even their count is known. default:
    whether the model gives the value itself where the caller does not.
    """

    name: str
    dtype: str
    dims: tuple[Dim, ...] | None
    default: bool = False


@dataclass(frozen=True)
class Sidecar:
    """A file beside the model that holds values. orphan_bytes: those that no tensor of the model reads."""

    name: str
    bytes: int
    orphan_bytes: int


@dataclass(frozen=True)
class ElementType:
    """The weights of one element type; contents that several constants share count once for each that stores them."""

    dtype: str
    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class LargeTensor:
    """One of the largest weights. zeros: share of elements, None where not looked at. distinct: how many values.

    distinct is None above 256, and where not looked at.
    """

    name: str
    dtype: str
    dims: tuple[int, ...]
    bytes: int
    zeros: float | None = None
    distinct: int | None = None


@dataclass(frozen=True)
class MacFacts:
    """Multiply-accumulates of Conv, ConvTranspose, Einsum, Gemm, MatMul and recurrent nodes, each body counted once.

    known: of the layers whose shapes are known. unknown: layers whose shapes are not. with_ones: of all layers, every
    open length of the inputs being 1; None where that does not tell either. open_lengths: symbols of the inputs.
    """

    known: int
    layers: int
    unknown: int
    with_ones: int | None = None
    open_lengths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """What one pass could win, estimated: nothing was proven.

    kind: "duplicates", "zeros", "palette", "low_rank", "channels", "foldable", "fusable", "identities", "unused",
    "simpler", "half" or "int8". pass_name: "" where no installed pass does it. bytes: of weights that could go; None
    where that is not known. count: of what `what` names. sample: what part was looked at, "" for all. Where nothing is
    estimated, `what` says why.
    """

    kind: str
    pass_name: str
    what: str
    count: int = 0
    bytes: int | None = None
    sample: str = ""


@dataclass(frozen=True)
class Inspection:
    """One model. path: its file, None for one in memory. operators: type -> nodes, of all bodies and functions.

    file_bytes: the file and its sidecars, or what the file would take. nodes: without Constant nodes, whose values
    count as weights. bodies: those of If, Loop and Scan.
    """

    path: str | None
    file_bytes: int
    sidecars: tuple[Sidecar, ...]
    producer: str
    ir_version: int
    opsets: dict[str, int]
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    nodes: int
    bodies: int
    functions: int
    operators: dict[str, int]
    parameters: int
    weight_bytes: int
    element_types: tuple[ElementType, ...]
    largest: tuple[LargeTensor, ...]
    macs: MacFacts
    estimates: tuple[Estimate, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    schema_version: str = field(default=SCHEMA_VERSION)

    def to_json(self) -> str:
        """The record as JSON."""
        from onnxopt.report.inspection_view import dump

        return dump([self])

    def to_text(self) -> str:
        """The record for the eye, in 80 columns, without colours."""
        from onnxopt.report.inspection_view import plain

        return plain([self])
