"""Time of jobs that are measured in turn."""

import time
from collections.abc import Callable


def measure(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each job in each round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            begun = time.perf_counter()
            job()
            if number:
                times[name].append(1000 * (time.perf_counter() - begun))
    return times
