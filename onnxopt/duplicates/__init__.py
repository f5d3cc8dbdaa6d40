"""Constants that hold the same values, as they are, transposed, scaled or nearly, and graphs that store them once."""

from onnxopt.duplicates.equal import equal_groups
from onnxopt.duplicates.near import Near, near_groups
from onnxopt.duplicates.related import Relation, related_groups
from onnxopt.duplicates.rewiring import WAYS, Rewirer

__all__ = ["WAYS", "Near", "Relation", "Rewirer", "equal_groups", "near_groups", "related_groups"]
