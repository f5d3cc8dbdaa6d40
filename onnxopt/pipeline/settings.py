"""What a run may be told besides its model, passes, feeds and budgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# (what is being done, steps done, steps in all or 0 where unknown)
Progress = Callable[[str, int, int], None]


def silent(_what: str, _done: int, _total: int) -> None:
    """Progress that is shown to nobody."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run; names and defaults are those of the command line.

    batch: feeds that calibration joins into one run. on_error: "stop" or "skip". verify: False compares nothing.
    latency_seconds: 0 leaves timing out. compressed: compress files of any size, not small ones alone. timeout: seconds
    that the saved model may take to load and run in its own process. external_data: see `Model.save`.
    """

    target: str = "auto"
    seed: int = 0
    threads: int = 1
    batch: int = 1
    on_error: str = "stop"
    verify: bool = True
    require_data: bool = False
    latency_seconds: float = 2.0
    compressed: bool = False
    timeout: float = 600.0
    force: bool = False
    keep_failed: bool = False
    external_data: str = "auto"
    dry_run: bool = False
