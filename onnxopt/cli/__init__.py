"""The command line. Only click is imported here; everything else when a command needs it."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `onnxopt` command: run it and leave with its exit code."""
    from onnxopt.cli.run import end_cleanly_when_terminated, run
    from onnxopt.cli.terminal import hold_streams

    hold_streams()
    end_cleanly_when_terminated()
    sys.exit(run(sys.argv[1:]))
