"""How long each stage of a run takes, how much of a given time is left, and what memory it took."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


class Stopwatch:
    """Seconds of each stage, and their total. Time before a stop counts too.

    Args:
        laps: Seconds of stages that are over.
    """

    def __init__(self, laps: Mapping[str, float] | None = None) -> None:
        self._last = time.perf_counter()
        self._laps = dict(laps or {})

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._laps[stage] = self._laps.get(stage, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        laps = {"total": sum(self._laps.values()), **self._laps}
        return {stage: round(seconds, 3) for stage, seconds in laps.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"laps": self._laps, "since": time.perf_counter() - self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for stage, seconds in state["laps"].items():
            self._laps[stage] = self._laps.get(stage, 0.0) + seconds
        self._last -= state["since"]


class Countdown:
    """The time that is left of a budget. Time before a stop counts; that between runs does not.

    Args:
        seconds: The budget.
        started: When the run started, on the clock.
        clock: Returns the present time in seconds.
    """

    def __init__(
        self,
        seconds: float,
        started: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.seconds, self._clock = seconds, clock
        self._started = clock() if started is None else started

    def used(self) -> float:
        """Return the seconds that have passed."""
        return self._clock() - self._started

    def left(self) -> float:
        """Return the seconds that are left; negative beyond the budget."""
        return self.seconds - self.used()

    def exclude(self, seconds: float) -> None:
        """Count some of the seconds that have passed as none of the budget."""
        self._started += seconds

    def state_dict(self) -> dict[str, Any]:
        return {"used": self.used()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._started -= state["used"]


def now(device: torch.device) -> float:
    """Seconds of a monotonic clock, read after a device has finished all queued work."""
    if device.type == "cuda":  # kernels run asynchronously
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak memory in bytes: what PyTorch took on a GPU, else that of this process.

    None on systems that do not report it: only Unix does.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
