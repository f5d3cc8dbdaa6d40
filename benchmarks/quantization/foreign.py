"""What runs under another interpreter, where NNCF or onnxsim is installed; imports nothing of this project.

    PYTHON foreign.py RECIPE SOURCE FEEDS OUT SAMPLES

makes one model and prints its seconds as JSON. FEEDS is a folder with one .npz (input name -> array) a sample.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx


def feeds_of(folder: Path, count: int) -> list[dict[str, Any]]:
    """The first `count` feeds, by name of their files."""
    feeds = []
    for path in sorted(folder.glob("*.npz"))[:count]:
        with np.load(path) as arrays:
            feeds.append({name: arrays[name] for name in arrays.files})
    return feeds


def nncf_quantized(source: Path, feeds: list[dict[str, Any]], fast: bool, transformer: bool) -> Any:
    """NNCF's post-training quantization with asymmetric activations (preset MIXED)."""
    import nncf

    return nncf.quantize(
        onnx.load(source),
        nncf.Dataset(feeds),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(feeds),
        fast_bias_correction=fast,
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
    )


def simplified(source: Path) -> Any:
    """What onnxsim makes of the float model."""
    import onnxsim

    model, checked = onnxsim.simplify(onnx.load(source))
    if not checked:
        raise ValueError("the simplified model does not agree with the original")
    return model


def pruned(source: Path, feeds: list[dict[str, Any]], recipe: str) -> Any:
    """onnxsim's unstructured pruning: recipe is onnxsim-CRITERION-ASKED, asked a share (0.5) or N:M (2:4)."""
    import onnxsim

    criterion, asked = recipe.split("-")[1:]
    kept, _, of = asked.partition(":")
    settings: dict[str, Any] = {"n": int(kept), "m": int(of)} if of else {"sparsity": float(kept)}
    model = onnx.load(source)
    if criterion == "magnitude":
        return onnxsim.apply_magnitude_pruning(model, **settings)
    apply = {"wanda": onnxsim.apply_wanda_pruning, "sparsegpt": onnxsim.apply_sparsegpt_pruning}[criterion]
    return apply(model, calibration_data=feeds, num_samples=len(feeds), **settings)


def main() -> int:
    """Make one model."""
    recipe, source, feeds, out, samples = sys.argv[1:]
    started = time.perf_counter()
    if recipe == "onnxsim":
        made = simplified(Path(source))
    elif recipe.startswith("onnxsim-"):
        made = pruned(Path(source), feeds_of(Path(feeds), int(samples)), recipe)
    else:
        given = feeds_of(Path(feeds), int(samples))
        made = nncf_quantized(Path(source), given, recipe != "nncf-full", recipe == "nncf-transformer")
    onnx.save(made, out)
    print(json.dumps({"seconds": time.perf_counter() - started}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
