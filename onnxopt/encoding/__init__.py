"""How tensors are written: palettes, bitmasks and sparse tensors that give back every bit of a weight.

A pass decides values; here it is decided what they take in the file. `store` writes forms as standard operators, which
the runtime folds when it loads the model. `Opened` shows them as weights again while a later pass runs.
"""

from onnxopt.encoding.find import find_channel_palette, find_mask, find_palette
from onnxopt.encoding.forms import Form, Masked, MaskedPalette, Palette, Sparse
from onnxopt.encoding.opened import Opened, parameters, smallest
from onnxopt.encoding.store import Stored, described, kept_dense, store

__all__ = [
    "Form",
    "Masked",
    "MaskedPalette",
    "Opened",
    "Palette",
    "Sparse",
    "Stored",
    "described",
    "find_channel_palette",
    "find_mask",
    "find_palette",
    "kept_dense",
    "parameters",
    "smallest",
    "store",
]
