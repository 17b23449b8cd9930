"""Runs a sweep: every cell in its own process, several at a time, with one table of all results."""

import asyncio
import csv
import io
import os
import signal
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Literal

from gdfq.deploy.safetensors import STUDENT_FILE
from gdfq.errors import UsageError
from gdfq.files.atomic import make_folder, write_atomically, write_json
from gdfq.files.plain_values import as_values
from gdfq.runs.metrics import Metrics, read_metrics
from gdfq.runs.names import METRICS
from gdfq.runs.sweep import Cell, Sweep
from gdfq.version import __version__

TABLE_JSON, TABLE_CSV, LOG = "sweep.json", "sweep.csv", "log.txt"


@dataclass(frozen=True)
class Row:
    """The result of a cell.

    Accuracies are top-1 in percent. `error_percent` is the largest relative error of an output, for
    a network that is not a classifier. `bytes` is the size of the ONNX file, or of the packed
    student if there is none.
    """

    network: str
    bits: str
    recipe: str
    placement: str | None
    layer_bits: str
    seed: int
    status: Literal["finished", "failed", "waiting"]
    teacher_top1: float | None = None
    student_top1: float | None = None
    error_percent: float | None = None
    bytes: int | None = None
    seconds: float | None = None
    error: str | None = None
    folder: str = ""


Tell = Callable[[Row, int, int], None]
"""Called when a cell ends, with its row, the number of cells that have ended, and of all cells."""


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_sweep(
    sweep: Sweep, out: Path, *, home: Path, jobs: int, threads: int = 1, tell: Tell
) -> list[Row]:
    """Run the cells that have not finished yet.

    Each cell is a new process that writes its output into its folder; a cell that fails does not
    stop the others. The table in `out` is written again whenever a cell ends. On an interruption
    the running cells receive SIGTERM, and the sweep waits for them.

    Args:
        sweep: What to run.
        out: Folder for the table and for one folder per cell.
        home: Folder that relative paths in the sweep refer to.
        jobs: Number of cells that run at the same time.
        threads: Threads of each cell.
        tell: Called whenever a cell ends.

    Returns:
        The rows of all cells, in the order of `sweep.cells()`.

    Raises:
        UsageError: `jobs` or `threads` is below 1, or `out` cannot be written.
        KeyboardInterrupt: The sweep was interrupted.
    """
    if jobs < 1 or threads < 1:
        raise UsageError(f"jobs and threads must be at least 1; got {jobs} and {threads}.")
    make_folder(out)
    cells = sweep.cells()
    rows = [_row(cell, out) for cell in cells]
    _write(sweep, rows, out)
    # Runs that have started are resumed first.
    waiting = [i for i, row in enumerate(rows) if row.status != "finished"]
    waiting.sort(key=lambda i: not (out / cells[i].folder).exists())
    environment = {**os.environ, **dict.fromkeys(_THREADS, str(threads))}

    async def run_all() -> None:
        slots = asyncio.Semaphore(jobs)
        task = asyncio.current_task()
        assert task is not None
        for name in _STOPPING:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                with suppress(NotImplementedError):  # only Unix has signal handlers of a loop
                    asyncio.get_running_loop().add_signal_handler(number, task.cancel)

        async def run(i: int) -> None:
            async with slots:
                ended = await _run(cells[i], out, home, environment)
            rows[i] = _row(cells[i], out, ended)
            _write(sweep, rows, out)
            tell(rows[i], sum(row.status != "waiting" for row in rows), len(rows))

        async with asyncio.TaskGroup() as group:
            for i in waiting:
                group.create_task(run(i))

    try:
        asyncio.run(run_all())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    except BaseExceptionGroup as several:  # errors of the sweep itself; errors of cells are in rows
        raise several.exceptions[0] from several
    return rows


_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_STOPPING = ("SIGTERM", "SIGHUP")
"""Signals that end a sweep like Ctrl-C, unless the process ignores them (nohup)."""


@dataclass(frozen=True)
class _Ended:
    """How the process of a cell ended.

    Attributes:
        code: Its exit code, negative for a signal.
        log_start: Bytes of the log before the process began: those of earlier attempts.
    """

    code: int
    log_start: int


async def _run(cell: Cell, out: Path, home: Path, environment: Mapping[str, str]) -> _Ended:
    """Run a cell's command, whose output is appended to its log."""
    folder = (out / cell.folder).resolve()
    folder.mkdir(exist_ok=True)
    # -P: no module is taken from `home`.
    words = [sys.executable, "-P", "-m", "gdfq", "quantize", f"--out={folder}", *cell.words()]
    with (folder / LOG).open("ab") as log:
        log_start = log.tell()
        # In its own session the process receives Ctrl-C only once, from the sweep.
        process = await asyncio.create_subprocess_exec(
            *words,
            cwd=home,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            return _Ended(await process.wait(), log_start)
        except asyncio.CancelledError:
            if process.returncode is None:
                process.terminate()
            await process.wait()
            raise


def _row(cell: Cell, out: Path, ended: _Ended | None = None) -> Row:
    """Read the row of a cell from its folder, whose process has ended if it was started."""
    folder = out / cell.folder
    status: Literal["finished", "failed", "waiting"] = "waiting"
    error: str | None = None
    metrics: Metrics = {}
    if ended is not None and ended.code:
        status, error = "failed", _why(folder / LOG, ended)
    elif (folder / METRICS).exists():
        try:
            metrics, status = read_metrics(folder), "finished"
        except UsageError as damaged:
            status, error = "failed", str(damaged)
    errors = metrics.get("student", {}).get("error_percent", {}).values()
    packed = folder / STUDENT_FILE
    return Row(
        network=cell.network.title,
        bits=cell.bits,
        recipe=cell.recipe,
        placement=cell.placement,
        layer_bits=" ".join(cell.layer_bits),
        seed=cell.seed,
        status=status,
        teacher_top1=metrics.get("teacher", {}).get("top1"),
        student_top1=metrics.get("student", {}).get("top1"),
        error_percent=max(errors, default=None),
        bytes=metrics.get("export", {}).get(
            "bytes", packed.stat().st_size if metrics and packed.exists() else None
        ),
        seconds=metrics.get("seconds", {}).get("total"),
        error=error,
        folder=cell.folder,
    )


_MAX_SAID_BYTES = 4096
"""Of a log, in which the last message of a process is looked for."""


def _why(log: Path, ended: _Ended) -> str:
    """Return why a process failed: the signal, or the last message that it wrote itself."""
    if ended.code < 0:
        return f"killed by {signal.Signals(-ended.code).name}; see {log}"
    with log.open("rb") as file:
        file.seek(max(ended.log_start, log.stat().st_size - _MAX_SAID_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
    said = [line for line in lines if line.startswith(("error: ", "failed: "))] or lines
    return said[-1] if said else f"exit code {ended.code}"


def _write(sweep: Sweep, rows: Sequence[Row], out: Path) -> None:
    values = [asdict(row) for row in rows]
    write_json(out / TABLE_JSON, {"gdfq": __version__, "sweep": as_values(sweep), "rows": values})
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(values)
    write_atomically(out / TABLE_CSV, text.getvalue().encode())


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text: mean ± standard deviation over the seeds of each setting."""
    settings = ("network", "bits", "recipe", "placement", "layer_bits")
    heading = [*settings, "seeds", "float", "quantized", "error %", "KiB", "seconds", ""]
    lines = [heading]
    for values, group in groupby(rows, lambda row: [getattr(row, name) for name in settings]):
        found = list(group)
        done = [row for row in found if row.status == "finished"]
        failed = sum(row.status == "failed" for row in found)
        sizes = [row.bytes / 1024 for row in done if row.bytes is not None]
        lines.append(
            [
                *(value or "" for value in values),
                str(len(done)),
                _spread([row.teacher_top1 for row in done]),
                _spread([row.student_top1 for row in done]),
                _spread([row.error_percent for row in done]),
                _spread(sizes, digits=0),
                _spread([row.seconds for row in done], digits=0),
                f"{failed} failed" if failed else "",
            ]
        )
    used = [i for i in range(len(heading)) if any(line[i] for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in used}
    padded = [[line[i].ljust(widths[i]) for i in used] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def _spread(values: Sequence[float | None], digits: int = 2) -> str:
    present = [value for value in values if value is not None]
    if not present:
        return ""
    text = f"{statistics.fmean(present):.{digits}f}"
    if len(set(present)) > 1:
        text += f" ± {statistics.stdev(present):.{digits}f}"
    return text
