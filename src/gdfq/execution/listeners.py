"""Listeners: what records the steps of a run, or shows them on a terminal."""

import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from gdfq.execution.durations import as_text
from gdfq.execution.progress import Step, is_due
from gdfq.execution.stopwatch import Countdown


class History:
    """Writes steps with losses or ranges as JSON lines, about `lines` of them per stage.

    When a run resumes, the lines after its checkpoint are removed and written again. So are the
    lines of a batch that a stop left unfinished: that batch is made again from its first step.
    """

    def __init__(self, path: Path, lines: int = 500) -> None:
        self._file = path.open("ab", buffering=0)  # nothing is left to fail when it is closed
        self._lines = lines
        self._whole = self._file.tell()  # bytes up to the end of the last line
        self._written: list[tuple[str, int, int]] = []  # of each line its stage, step and place

    def __call__(self, step: Step) -> None:
        is_due_now = bool(step.losses) and is_due(step.index, step.total, self._lines)
        if not is_due_now and not step.ranges:
            return
        losses = {name: float(value) for name, value in step.losses.items()}
        record: dict[str, object] = {"stage": step.stage, "step": step.index, **losses}
        if step.rate is not None:
            record["rate"] = step.rate
        if step.ranges:
            record["ranges"] = dict(step.ranges)
        while self._written and self._written[-1][0] == step.stage:
            if self._written[-1][1] < step.index:
                break
            self._cut_(self._written.pop()[2])
        line = json.dumps(record).encode() + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._written.append((step.stage, step.index, self._whole))
        self._whole += len(line)

    def _cut_(self, size: int) -> None:
        self._whole = min(self._whole, size)
        self._file.truncate(self._whole)

    def state_dict(self) -> dict[str, Any]:
        os.fsync(self._file.fileno())  # a checkpoint must not know of lines that were lost
        return {"bytes": self._whole, "lines": list(self._written)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._cut_(state["bytes"])
        self._written = [(stage, step, place) for stage, step, place in state["lines"]]

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


class Terminal:
    """Progress on standard error: a bar on a terminal, a plain line now and then elsewhere.

    Args:
        out: The stream; standard error by default.
        interval: Seconds between two lines where the stream is no terminal.
        countdown: The time budget of the run. What is left of it is shown instead of the time that
            a stage still takes.
    """

    def __init__(
        self,
        out: TextIO | None = None,
        interval: float = 10.0,
        countdown: Countdown | None = None,
    ) -> None:
        self._out = out or sys.stderr
        self._countdown = countdown
        self._interval = interval
        self._stage = ""
        self._started = self._printed = time.monotonic()
        self._first = 0
        self._bar = _rich_bar(self._out, countdown) if self._out.isatty() else None

    def __enter__(self) -> "Terminal":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, step: Step) -> None:
        now = time.monotonic()
        if step.stage != self._stage:
            self._stage, self._started, self._first = step.stage, now, step.index - 1
            self._printed = now - self._interval
            if self._bar is not None:
                self._task = self._bar.add_task(step.stage, total=step.total, losses="", left="")
        finished = step.index == step.total
        pause = 0.2 if self._bar is not None else self._interval
        if now - self._printed < pause and not finished:
            return
        self._printed = now
        losses = "  ".join(f"{name} {float(value):.4g}" for name, value in step.losses.items())
        if self._bar is not None:
            left = self._left_of_budget()
            self._bar.update(self._task, completed=step.index, losses=losses, left=left)
            return
        print(
            f"{step.stage} {step.index}/{step.total}  {losses}{self._remaining(step, now)}",
            file=self._out,
            flush=True,
        )

    def _remaining(self, step: Step, now: float) -> str:
        """Return what is left: of the budget, or without one of the stage."""
        if self._countdown is not None:
            return f"  {self._left_of_budget()}"
        done = step.index - self._first
        if done <= 1 or step.index == step.total:
            return ""
        left = (now - self._started) / done * (step.total - step.index)
        return f"  {as_text(left)} left"

    def _left_of_budget(self) -> str:
        if self._countdown is None:
            return ""
        left, whole = max(0.0, self._countdown.left()), self._countdown.seconds
        return f"{as_text(left)} of {as_text(whole)} left"


def _rich_bar(out: TextIO, countdown: Countdown | None):  # type: ignore[no-untyped-def]
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:>9}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn() if countdown is None else TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[losses]}"),
        console=Console(file=out),
    )
