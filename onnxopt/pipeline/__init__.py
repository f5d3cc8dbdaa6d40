"""From a pass list to a verdict: parse, prepare, run, prove or roll back, compare, judge, write."""

from onnxopt.pipeline.calibrate import CalibrationRun
from onnxopt.pipeline.check import check
from onnxopt.pipeline.facts import sidecars
from onnxopt.pipeline.failure import reported
from onnxopt.pipeline.final import Demands
from onnxopt.pipeline.grammar import PassLike, Step, canonical, parse
from onnxopt.pipeline.inputs import FeedsLike, Inputs
from onnxopt.pipeline.meeting import meet
from onnxopt.pipeline.optimize import Run
from onnxopt.pipeline.output import check_output, failed_path
from onnxopt.pipeline.result import Result, VerdictError
from onnxopt.pipeline.saved import Calibration, SavedFiles, StatisticsLike
from onnxopt.pipeline.settings import Progress, Settings, silent
from onnxopt.pipeline.signature import NamesLike, ShapesLike, SignatureChange

__all__ = [
    "Calibration",
    "CalibrationRun",
    "Demands",
    "FeedsLike",
    "Inputs",
    "NamesLike",
    "PassLike",
    "Progress",
    "Result",
    "Run",
    "SavedFiles",
    "Settings",
    "ShapesLike",
    "SignatureChange",
    "StatisticsLike",
    "Step",
    "VerdictError",
    "canonical",
    "check",
    "check_output",
    "failed_path",
    "meet",
    "parse",
    "reported",
    "sidecars",
    "silent",
]
