"""How long each stage of a run takes."""

import time
from collections.abc import Mapping
from typing import Any


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
