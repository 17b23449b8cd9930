"""A process that loads one file and times calls of it: `python -m gdfq.deploy.timed_process`.

It answers JSON objects (`gdfq.deploy.line_process`):

    {"load": "module:function", "file": ..., "threads": 1}    {}
    {"shapes": [[1, 3, 32, 32]]}                              {"peak": 61000000}
    {"seconds": 0.02}                                         {"times": [0.00011, ...]}

An answer `{"error": ...}` says why an input cannot be used. `peak` is the most memory that the
process has taken so far, in bytes, or null where the system does not tell it.
"""

import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from gdfq.deploy.calls import Call, Shapes
from gdfq.deploy.line_process import answer_lines


def main() -> None:
    answer_lines(_Process().answer)


class _Process:
    """The file and the call that is timed now."""

    def __init__(self) -> None:
        self.prepare: Callable[[Shapes], Call] | None = None
        self.call: Call | None = None

    def answer(self, asked: dict[str, Any]) -> dict[str, object]:
        if "load" in asked:
            module, _, name = str(asked["load"]).partition(":")
            load = getattr(import_module(module), name)
            self.prepare = load(Path(asked["file"]), asked["threads"])
            return {}
        if "shapes" in asked:
            assert self.prepare is not None
            self.call = self.prepare([tuple(shape) for shape in asked["shapes"]])
            self.call()  # the first call allocates
            return {"peak": peak_bytes()}
        assert self.call is not None
        return {"times": timed(self.call, asked["seconds"])}


def timed(call: Call, seconds: float) -> list[float]:
    """Return the seconds of each of as many calls as fit into a time, at least one."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


_STATUS = Path("/proc/self/status")


def peak_bytes() -> int | None:
    """Return the most memory that this process has taken; None where the system does not tell."""
    if _STATUS.exists():  # Linux, whose getrusage counts the memory of the process before exec, too
        found = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        return 1024 * int(found[0].split()[1]) if found else None
    if sys.platform != "darwin":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
