"""What one run knows, as data, and its views: text and JSON."""

from onnxopt.report.files import FORMATS, check_paths, obstacle, write
from onnxopt.report.record import (
    BudgetFigures,
    ComparisonFigures,
    ErrorFacts,
    FeedFacts,
    LatencyFigures,
    MetricFigures,
    ModelFacts,
    OutputFigures,
    PassRecord,
    Report,
    Status,
    Verdict,
)

__all__ = [
    "FORMATS",
    "BudgetFigures",
    "ComparisonFigures",
    "ErrorFacts",
    "FeedFacts",
    "LatencyFigures",
    "MetricFigures",
    "ModelFacts",
    "OutputFigures",
    "PassRecord",
    "Report",
    "Status",
    "Verdict",
    "check_paths",
    "obstacle",
    "write",
]
