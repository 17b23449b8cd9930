"""Fuzzing: every loader reads 100,000 mutated files in all, and refuses them in the documented way.

    python benchmarks/fuzz.py                           # all, some minutes on one core
    python benchmarks/fuzz.py --only npz --index 4711   # one input again

Inputs are bit flips, cuts and splices of valid files, edits of their headers with valid lengths and
checksums, and of their JSON as a tree. Input i of a loader depends on --seed and i alone; a run that
was stopped goes on. Loaders run in child processes under a limit of memory. Failures are: any exception
but GdfqError, a death of the process, more than 20 seconds of a core, more than 512 MiB, memory that was
asked for in vain, and what the interpreter's audit hears: files opened outside the folder of the test,
processes, sockets. Results: benchmarks/results/fuzz.json; the exit code is 1 when there are failures.
"""

import argparse
import base64
import json
import mmap
import os
import resource
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import safetensors.torch
import torch
from mutations import (
    CLASSES,
    SHAPE,
    checkpoint,
    image_files,
    images_npz,
    network,
    of_checkpoint,
    of_document,
    of_image,
    of_onnx,
    of_run,
    of_safetensors,
    of_sweep,
    of_text,
    of_zip,
    onnx_file,
    run_files,
    scramble,
    student,
    torch_files,
)
from torch import nn

from gdfq.cli.app import _Numbers, _Shape, _Size
from gdfq.data.datasets import load_data
from gdfq.data.preprocessing import Preprocessing
from gdfq.deploy import safetensors as packed
from gdfq.deploy.benchmark import side_by_side, size_of
from gdfq.deploy.safetensors import STUDENT_FILE
from gdfq.errors import GdfqError, UsageError
from gdfq.execution.checkpoints import Checkpoints
from gdfq.files.atomic import write_json
from gdfq.files.states import name_of
from gdfq.functional.grid import Bits
from gdfq.graph import operators
from gdfq.models.loaded import Loaded
from gdfq.models.registry import load_model, load_weights_
from gdfq.quantized import load
from gdfq.recipes import find_recipe
from gdfq.report.read import read_run as read_for_report
from gdfq.runs.folder import RunFolder, check_export
from gdfq.runs.sweep import read_sweep
from gdfq.student.scheme import Keep

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
MEMORY, ROOM, SECONDS, CHUNK = 512, 6144, 20, 2000
"""MiB that one input may add, MiB of address space (Python's files reserve what a length of 32 bits
asks for, and do not touch it), seconds of a core, and inputs that one child process reads."""


# --- loaders


def read_npz_(data: bytes, folder: Path) -> None:
    (folder / "data.npz").write_bytes(data)
    load_data(folder / "data.npz", SHAPE, CLASSES)


def read_images(data: bytes, folder: Path) -> None:
    (folder / "a").mkdir(exist_ok=True)
    (folder / "a" / "x.png").write_bytes(data)
    load_data(folder, SHAPE, None)


def read_weights(suffix: str) -> Callable[[bytes, Path], None]:
    model = network()

    def read(data: bytes, folder: Path) -> None:
        (folder / f"w{suffix}").write_bytes(data)
        load_weights_(model, folder / f"w{suffix}")

    return read


def read_student(data: bytes, folder: Path) -> None:
    (folder / STUDENT_FILE).write_bytes(data)
    packed.read(folder / STUDENT_FILE)


def read_run(data: bytes, folder: Path) -> None:
    (folder / ".lock").unlink(missing_ok=True)
    for name, content in RUN.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
    changed, _, content = data.partition(b"\n")
    path = folder / changed.decode()
    path.unlink()
    if content:
        path.write_bytes(content)
    else:
        path.symlink_to("/etc/passwd")
    errors = []
    read_for_report(folder).drop  # noqa: B018
    for reads in (RunFolder, check_export, load):
        try:
            reads(folder)
        except GdfqError as error:
            errors.append(error)
    if len(errors) == 3:
        raise errors[-1]


def read_checkpoint(data: bytes, folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / f"checkpoint-000001-{name_of(data)}.safetensors").write_bytes(data)
    keeper = Checkpoints(folder)
    keeper.begin({"seed": 0}, {"torch": "2"})
    keeper.hold("student", network())
    keeper.save()


def read_onnx(data: bytes, folder: Path) -> None:
    (folder / "b.bin").write_bytes(bytes(16))
    (folder / "m.onnx").write_bytes(data)
    size_of(folder / "m.onnx")
    next(side_by_side([folder / "m.onnx"], SHAPE, seconds=1e-9, batches=(1,), threads=(1,)))


def read_text(data: bytes, _: Path) -> None:
    text = data.decode(errors="replace")
    calls: list[Callable[[], object]] = [
        lambda: Bits.parse(text),
        lambda: Keep.parse(text),
        lambda: find_recipe(text),
        lambda: Loaded(nn.Identity()).input(_Shape().convert(text, None, None), (0.5,), None),
        lambda: Preprocessing.of(1, _Numbers().convert(text, None, None), None),
        lambda: _Size().convert(text, None, None),
    ]
    if ":" not in text:  # those run code, as they should
        calls.append(lambda: load_model(text))
    accepted = 0
    for call in calls:
        try:
            call()
            accepted += 1
        except (GdfqError, click.BadParameter):
            pass
    if not accepted:
        raise UsageError("it is none of them")


def read_sweep_(data: bytes, folder: Path) -> None:
    (folder / "sweep.yaml").write_bytes(data)
    read_sweep(folder / "sweep.yaml").cells()


WORDS = [
    b"w4a8",
    b"stage1.*=float",
    b"last=8",
    b"fast",
    b"3x32x32",
    b"0.5,0.5,0.5",
    b"1.5MiB",
    b"net.onnx",
]
SWEEPS = [
    b"networks: [net.onnx, timm:resnet18]\nbits: [w4a4, w8a8]\nseeds: [0, 1, 2]\nsteps: 100\n",
    b"""networks:
  - model: file.py:net
    name: mine
    input: [3, 32, 32]
    mean: 0.5
    classifier: false
    size: 300KB
recipes: [fast, round]
bits: auto
placement: [full, t1]
keep: [[], ["last=8", "stem.*=float"]]
""",
]
RUN = run_files()


@dataclass(frozen=True)
class Loader:
    """What reads files, valid files for it, how they are changed, and how many are tried of 100."""

    read: Callable[[bytes, Path], None]
    valid: Sequence[bytes]
    change: Callable[[bytes, Random], bytes]
    share: int


LOADERS = {
    "npz": Loader(read_npz_, [images_npz()], of_zip, 14),
    "image folder": Loader(read_images, image_files(), of_image, 15),
    "weights, safetensors": Loader(
        read_weights(".safetensors"),
        [safetensors.torch.save(network().state_dict())],
        of_safetensors,
        12,
    ),
    "weights, torch": Loader(read_weights(".pt"), torch_files(legacy=False), of_zip, 11),
    "weights, torch before 1.6": Loader(
        read_weights(".pth"), torch_files(legacy=True), scramble, 11
    ),
    "quantized network": Loader(read_student, [student()], of_safetensors, 12),
    "quantized network, signed": Loader(read_student, [student()], of_document, 4),
    "run folder": Loader(
        read_run, [json.dumps({name: data.hex() for name, data in RUN.items()}).encode()], of_run, 3
    ),
    "checkpoint": Loader(read_checkpoint, [checkpoint()], of_checkpoint, 4),
    "ONNX": Loader(read_onnx, [onnx_file()], of_onnx, 6),
    "options": Loader(read_text, WORDS, of_text, 5),
    "sweep": Loader(read_sweep_, SWEEPS, of_sweep, 3),
}


def made(name: str, seed: int, index: int) -> bytes:
    """The input of that number."""
    loader, random = LOADERS[name], Random(f"{seed}/{name}/{index}")  # noqa: S311
    return loader.change(random.choice(loader.valid), random)


# --- the run


class Watch:
    """What the interpreter says it does: files outside the folder, processes, sockets."""

    def __init__(self, folder: Path) -> None:
        paths = {sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")}
        # Tracebacks quote sources.
        sources = (str(Path(operators.__file__).parents[1]), __file__, os.path.abspath(sys.argv[0]))
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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
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
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
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
    resource.setrlimit(resource.RLIMIT_AS, (int(size + ROOM) * 2**20,) * 2)
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
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=100_000, help="in all; a fresh run's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(LOADERS))
    parser.add_argument("--index", type=int, help="one input, in this process")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.index is not None:
        with tempfile.TemporaryDirectory() as folder:
            data = made(options.only, options.seed, options.index)
            LOADERS[options.only].read(data, Path(folder))
        return
    torch.set_num_threads(1)
    packed.from_safetensors(student())  # what torch imports for the first one is no input's fault
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
