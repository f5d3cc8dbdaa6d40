"""What a rewrite cost: outputs compared, tolerances, metrics and budgets."""

from onnxopt.verification.budgets import (
    BUDGETS,
    CHANGE,
    Budget,
    Measured,
    Verdict,
    check_outputs,
    judge,
    metric_names,
    parse,
    parse_all,
)
from onnxopt.verification.compare import Comparer, Comparison, OutputComparison, compare
from onnxopt.verification.metrics import Metric, MetricChange, default_names, evaluate, measure
from onnxopt.verification.outputs import RecordedOutputs
from onnxopt.verification.tolerances import Failure, holds, reordering, rounding_tolerance, warnings

__all__ = [
    "BUDGETS",
    "CHANGE",
    "Budget",
    "Comparer",
    "Comparison",
    "Failure",
    "Measured",
    "Metric",
    "MetricChange",
    "OutputComparison",
    "RecordedOutputs",
    "Verdict",
    "check_outputs",
    "compare",
    "default_names",
    "evaluate",
    "holds",
    "judge",
    "measure",
    "metric_names",
    "parse",
    "parse_all",
    "reordering",
    "rounding_tolerance",
    "warnings",
]
