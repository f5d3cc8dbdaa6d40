"""onnxruntime: sessions, interleaved timing, and a child process that may be killed."""

from onnxopt.runtime.ports import Array, Port
from onnxopt.runtime.probe import Probe
from onnxopt.runtime.session import Session

__all__ = ["Array", "Port", "Probe", "Session"]
