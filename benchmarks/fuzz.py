"""Fuzzing: every loader reads 100,000 mutated files in all, and refuses them in the documented way.

    python -m benchmarks.fuzz                           # all, some minutes on one core
    python -m benchmarks.fuzz --only npz --index 4711   # one input again

Inputs are bit flips, cuts and splices of valid files, edits of their headers with valid lengths and
checksums, and of their JSON as a tree. Input i of a loader depends on --seed and i alone; a run that
was stopped resumes. Loaders run in child processes under a limit of memory. Failures are: any exception
but GdfqError, a death of the process, more than 20 seconds of a core, more than 512 MiB, memory that was
asked for in vain, and what the interpreter's audit hears: files opened outside the folder of the test,
processes, sockets. Results: benchmarks/results/fuzz.json; the exit code is 1 when there are failures.
"""

import argparse
import base64
import json
import mmap
import os
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
import warnings
import zlib
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import onnxruntime
import safetensors
import torch
from benchmarks.unix import limit_address_space_, peak_resident_mib
from support import valid_files
from support.loaders import LOADERS, Loader
from support.places import RESULTS, ROOT

from gdfq.deploy import safetensors as packed
from gdfq.errors import GdfqError
from gdfq.files.atomic import write_json
from gdfq.graph import operators

FILE = RESULTS / "fuzz.json"
MEMORY, ROOM, SECONDS, CHUNK = 512, 6144, 20, 2000
"""MiB that one input may add, MiB of address space (Python's files reserve what a length of 32 bits
asks for, and do not touch it), seconds of a core, and inputs that one child process reads."""


def made(name: str, seed: int, index: int) -> bytes:
    """The input of that number."""
    loader, random = LOADERS[name], Random(f"{seed}/{name}/{index}")  # noqa: S311
    return loader.change(random.choice(loader.valid), random)


class Watch:
    """What the interpreter says it does: files outside the folder, processes, sockets."""

    def __init__(self, folder: Path) -> None:
        paths = {sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")}
        # Tracebacks quote sources.
        package = Path(operators.__file__).parents[1]
        sources = map(str, (package, ROOT / "support", ROOT / "benchmarks"))
        known = (*map(os.path.realpath, paths), *paths, *sources, "/proc/self", "/dev/null")
        self.roots = (str(folder), *known)
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | bytes):
            if not os.path.realpath(os.fsdecode(args[0])).startswith(self.roots):
                self.seen.append(f"open {args[0]!r}")
        elif event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn")):
            self.seen.append(f"{event} {args!r:.200}")


def outcome(loader: Loader, data: bytes, folder: Path, watch: Watch) -> str:
    """`accepted`, `refused`, or what went wrong."""
    watch.seen.clear()
    before = peak_resident_mib()
    found = "accepted"
    try:
        loader.read(data, folder)
    except GdfqError as error:
        found = "refused"
        if isinstance(error.__cause__, MemoryError) or "can't allocate memory" in str(error):
            found = f"memory was asked for in vain: {error}"
    except BaseException as error:  # Rust's panics are no Exceptions
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        found = f"{type(error).__name__}: {error} ({Path(frame.f_code.co_filename).name}:{line})"
    grown = peak_resident_mib() - before
    if grown > MEMORY:
        found = f"took {grown:.0f} MiB"
    if watch.seen:
        found = f"did: {'; '.join(watch.seen[:3])}"
    return found


def chunk(
    name: str, seed: int, first: int, last: int, counter: mmap.mmap, folder: Path
) -> dict[str, Any]:
    """Inputs first..last of a loader, in this process."""
    warnings.simplefilter("ignore")
    _high_water(reset=True)
    base, size = _status("VmRSS"), _status("VmSize")
    limit_address_space_(int(size + ROOM) * 2**20)
    os.chdir(folder)
    watch, started = Watch(folder), time.process_time()
    found: dict[str, Any] = {"inputs": 0, "accepted": 0, "refused": 0, "failures": []}
    for index in range(first, last):
        data = made(name, seed, index)
        counter[:8] = (index + 1).to_bytes(8, "little")
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(10 * SECONDS)  # for what waits
        what = outcome(LOADERS[name], data, folder, watch)
        signal.setitimer(signal.ITIMER_PROF, 0)
        found["inputs"] += 1
        if what in found:
            found[what] += 1
        else:
            found["failures"].append(failure(index, what, data))
    return {
        **found,
        "cpu_seconds": time.process_time() - started,
        "peak_mib": round(_high_water() - base),
    }


def failure(index: int, what: str, data: bytes) -> dict[str, Any]:
    content = base64.b64encode(zlib.compress(data)).decode()
    return {"index": index, "what": what[:400], "zlib_base64": content[:20000]}


def _status(key: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def _high_water(*, reset: bool = False) -> float:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmHWM")


def in_child(name: str, seed: int, first: int, last: int) -> dict[str, Any]:
    """The same in a child process; when it dies, what it read last is a failure."""
    counter = mmap.mmap(-1, 8)
    counter[:8] = first.to_bytes(8, "little")
    with tempfile.TemporaryDirectory() as scratch:
        answer, folder = Path(scratch) / "answer", Path(scratch) / "files"
        folder.mkdir()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                answer.write_text(json.dumps(chunk(name, seed, first, last, counter, folder)))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if answer.exists() and status == 0:
            return json.loads(answer.read_text())
    reached = int.from_bytes(counter[:8], "little")
    if reached == first:
        raise SystemExit(f"{name}: the child process ended with status {status} before it began")
    what = f"the process ended with status {status} (27: {SECONDS} seconds passed)"
    lost = failure(reached - 1, what, made(name, seed, reached - 1))
    return {"inputs": reached - first, "accepted": 0, "refused": 0, "failures": [lost]}


def added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    total = {key: one.get(key, 0) + other.get(key, 0) for key in ("inputs", "accepted", "refused")}
    seconds = round(one.get("cpu_seconds", 0) + other.get("cpu_seconds", 0), 1)
    peak = max(one.get("peak_mib", 0), other.get("peak_mib", 0))
    failures = [*one.get("failures", []), *other["failures"]]
    return {**total, "cpu_seconds": seconds, "peak_mib": peak, "failures": failures}


def table(loaders: dict[str, Any]) -> str:
    lines = [
        "| loader | inputs | refused | accepted | failures | CPU seconds | memory at most |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in loaders.items():
        counts = " | ".join(f"{row[key]:,}" for key in ("inputs", "refused", "accepted"))
        lines.append(
            f"| {name} | {counts} | {len(row['failures'])} | {row['cpu_seconds']:.0f} | "
            f"{row['peak_mib']} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=100_000, help="in all; a fresh run's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(LOADERS))
    parser.add_argument("--index", type=int, help="one input, in this process")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    if options.index is not None:
        with tempfile.TemporaryDirectory() as folder:
            data = made(options.only, options.seed, options.index)
            LOADERS[options.only].read(data, Path(folder))
        return
    torch.set_num_threads(1)
    packed.from_safetensors(
        valid_files.student()
    )  # what torch imports for the first one is no input's fault
    asked = {"seed": options.seed, "inputs": options.inputs}
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    if {key: results.get(key) for key in asked} != asked:
        results = {**asked, "versions": _versions(), "wall_seconds": 0.0, "loaders": {}}
    for name, loader in LOADERS.items():
        count = options.inputs * loader.share // 100
        while options.only in (None, name):
            so_far = results["loaders"].get(name, {})
            done = so_far.get("inputs", 0)
            if done >= count:
                break
            started = time.perf_counter()
            found = in_child(name, options.seed, done, min(done + CHUNK, count))
            results["loaders"][name] = added(so_far, found)
            results["wall_seconds"] = round(
                results["wall_seconds"] + time.perf_counter() - started, 1
            )
            write_json(options.out, results)
    print(table(results["loaders"]))
    cpu = sum(row["cpu_seconds"] for row in results["loaders"].values())
    print(f"\n{cpu / 60:.1f} minutes of one core, {results['wall_seconds'] / 60:.1f} by the clock")
    sys.exit(any(row["failures"] for row in results["loaders"].values()))


def _versions() -> dict[str, str]:
    modules = (torch, np, onnx, onnxruntime, safetensors)
    return {module.__name__: module.__version__ for module in modules}


if __name__ == "__main__":
    main()
