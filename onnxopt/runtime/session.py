"""The one place where onnxruntime sessions are made and configured."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnxruntime

from onnxopt.errors import UsageError
from onnxopt.runtime import messages
from onnxopt.runtime.ort_values import from_ort_value, to_ort_value
from onnxopt.runtime.ports import Port, is_extension, port

if TYPE_CHECKING:
    from onnxopt.model import Model, TensorData

ModelSource: TypeAlias = "Model | Path | str | bytes"

# Failures come back as exceptions; at 3 the runtime would print each of them on stderr as well.
_FATAL_ONLY = 4
_NO_PACKING = "session.disable_prepacking"
_WEIGHTS = "session.optimized_model_external_initializers"


class Session:
    """A model loaded into onnxruntime's CPU provider, sequential, with a fixed number of threads.

    model: a Model (large weights of its main graph are mapped or handed over, never part of a message), the path of a
    file, or serialized bytes.
    optimize: ORT_ENABLE_ALL, else ORT_DISABLE_ALL without prepacked weights: a kernel given a computed weight sums in
    another order than one that packed a constant, so only then are equal values equal bits. threads: for the
    operators. optimized_path: where onnxruntime writes the model as it optimised it; needs `optimize`.
    optimized_weights: the name of a file beside that for the weights from 1 KiB on; without, they are part of it, up to
    2 GB. Such a session is made to be read and packs no weights, which is half of what loading a large model takes.
    one_block: let the runtime plan all tensors of a run into one block of memory; without, each is freed after its use.
    Raises UsageError for a missing file and ModelError when onnxruntime refuses the model: its message in one line,
    with the node if it names one.
    """

    def __init__(
        self,
        model: ModelSource,
        *,
        optimize: bool = True,
        threads: int = 1,
        optimized_path: Path | None = None,
        optimized_weights: str | None = None,
        one_block: bool = True,
        name: str | None = None,
    ) -> None:
        if threads < 1:
            raise UsageError(f"a session can't run on {threads} threads", "use 1 or more")
        self.threads = threads
        self.name = name or _name(model)
        options = _options(optimize, threads, optimized_path)
        if optimized_weights is not None:
            options.add_session_config_entry(f"{_WEIGHTS}_file_name", optimized_weights)
            options.add_session_config_entry(f"{_WEIGHTS}_min_size_in_bytes", "1024")
            options.add_session_config_entry(_NO_PACKING, "1")
        options.enable_mem_pattern = one_block
        source, self._kept = _source(model, options)
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a dozen classes that share no base
            raise messages.load_error(self.name, error) from error
        self.inputs: list[Port] = [port(argument) for argument in self._session.get_inputs()]
        self.optional_inputs: list[Port] = [
            port(argument, required=False) for argument in self._session.get_overridable_initializers()
        ]
        self.outputs: list[Port] = [port(argument) for argument in self._session.get_outputs()]
        self._names = [output.name for output in self.outputs]
        ports = [*self.inputs, *self.optional_inputs, *self.outputs]
        self._raw = any(item.dtype is not None and is_extension(item.dtype) for item in ports)

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Run once. inputs: name -> array (a list of arrays for a sequence). outputs: the names wanted, default all.

        Returns name -> array; a list for sequences and maps, None for an empty optional. Raises PassError when the
        inputs don't fit or the run fails, naming the input or the node at fault.
        """
        names = self._names if outputs is None else list(outputs)
        try:
            values = self._run_raw(names, inputs) if self._raw else self._session.run(names, dict(inputs))
        except Exception as error:
            ports = [*self.inputs, *self.optional_inputs]
            raise messages.run_error(self.name, ports, inputs, self._names, error) from error
        return dict(zip(names, values, strict=True))

    def _run_raw(self, names: list[str], inputs: Mapping[str, Any]) -> list[Any]:
        fed = {name: to_ort_value(np.asarray(value)) for name, value in inputs.items() if value is not None}
        return [from_ort_value(value) for value in self._session.run_with_ort_values(names, fed)]


def _options(optimize: bool, threads: int, optimized_path: Path | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    # Idle threads of one session would spin on the cores that another one is timed on.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # by itself the runtime would take a file whose bytes say so for another format than the one that was checked
    options.add_session_config_entry("session.load_model_format", "ONNX")
    if not optimize:
        options.add_session_config_entry(_NO_PACKING, "1")
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    return options


def _name(model: ModelSource) -> str:
    if isinstance(model, (str, Path)):
        return str(model)
    path = None if isinstance(model, bytes) else model.path
    return "the model" if path is None else str(path)


def _source(model: ModelSource, options: Any) -> tuple[str | bytes, list[Any]]:
    """What InferenceSession takes, and what must live as long as the session."""
    if isinstance(model, bytes):
        return model, []
    if isinstance(model, (str, Path)):
        if not Path(model).is_file():
            raise UsageError(f"{model}: no such file", "check the path of the model")
        return os.fspath(model), []
    proto, tensors = model.skeleton()
    inside = _refer_to_files(proto, tensors, model.path.parent, options) if model.path is not None else set()
    left = {name: data for name, data in tensors.items() if name not in inside}
    return proto.SerializeToString(), _hand_over(left, options)


def _refer_to_files(proto: Any, tensors: Mapping[str, TensorData], folder: Path, options: Any) -> set[str]:
    """Let onnxruntime map the values that lie in files beside the model, where handing them over makes it copy them.

    Returns the names of those tensors. They count as the same bytes: a file that was replaced is not referred to.
    """
    found = set()
    for tensor in proto.graph.initializer:
        place = tensors[tensor.name].place(folder) if tensor.name in tensors else None
        if place is None or not place[2]:
            continue
        del tensor.external_data[:]
        for key, value in zip(("location", "offset", "length"), place, strict=True):
            tensor.external_data.add(key=key, value=str(value))
        found.add(tensor.name)
    if found:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    return found


def _hand_over(tensors: Mapping[str, TensorData], options: Any) -> list[Any]:
    arrays = {name: data.array() for name, data in tensors.items()}
    values = [to_ort_value(array) for array in arrays.values()]
    options.add_external_initializers(list(arrays), values)
    return [arrays, values]
