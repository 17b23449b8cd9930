"""What a step costs on networks of usual size: time and memory against plain float training.

    python -m benchmarks.speed --scale              # every network, written as soon as it is there
    python -m benchmarks.speed --scale mobilenet    # those whose name contains this

Random weights, 16 images of 224x224, one thread, float32, channels_last. Four steps, the same
batch in each:

- *float*: the user's own eager module in training mode. Forward, cross-entropy, backward, update by
  Adam. No distillation, nothing of gdfq.
- *student*: the captured student of recipe `fast` (w4a4, placement `full`, learned grids, batch
  norms folded), alone. The same forward, cross-entropy, backward, and update by Adam, all 16 images
  at once.
- *parts*: the same, but as tuning always runs it: images as large as these pass in parts, whose
  gradients add up. It shows what tuning's own way with memory is worth.
- *tuning*: a whole step of `fast`, in parts too: the student and, without gradient, the teacher, the
  losses of features and outputs, backward and update.

Times: the four in turn in one process, after a round that does not count. Memory: each in a child
process of its own that starts with the networks built and unused memory given back; the rise of the
process's peak over two steps (the second has the optimizer's state), and separately the bytes of
the networks' tensors. Linux only. Needs the extras `timm` and `torchvision`; a network of a library
that is absent is skipped with a line.
"""

import ctypes
import json
import multiprocessing
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from benchmarks.timing import measure
from support.narrowing import instance
from support.places import RESULTS
from support.torchvision_shim import define_missing_operators
from torch import Tensor, nn

from gdfq.errors import UsageError
from gdfq.execution.malloc import keep_freed_memory_
from gdfq.execution.seeding import stream
from gdfq.functional.grid import Bits
from gdfq.graph.capture import capture
from gdfq.models.registry import RANDOM, load_model
from gdfq.quantizers.family import LSQ
from gdfq.recipes import FAST
from gdfq.sources.base import Batch
from gdfq.student.build import build_student
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_
from gdfq.tuning.distill import Distillation, tune_

FILE = RESULTS / "scale.json"
NETWORKS = (
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:mobilenet_v2",
    "timm:vit_small_patch16_224",
)
BATCH, ROUNDS = 16, 3
FORK = multiprocessing.get_context("fork")
Step = Callable[[], object]


def in_child(job: Callable[[], Any]) -> Any:
    """What a job returns that runs in a child process; EOFError when that ends without a result.

    With one thread, and no backward pass before, torch works on in a forked process.
    """
    receiving, sending = FORK.Pipe(duplex=False)
    child = FORK.Process(target=lambda: sending.send(job()))
    child.start()
    sending.close()
    result = receiving.recv()
    child.join()
    return result


def peak_rise(step: Step) -> float:
    """MiB that the peak of this process's memory rises above what it holds now, over two steps."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    held = _peak()
    for _ in range(2):
        step()
    return _peak() - held


def _peak() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def mebibytes(*modules: nn.Module) -> float:
    """Of the tensors of some modules, each counted once."""
    tensors: dict[int, Tensor] = {}
    for module in modules:
        tensors |= {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.nbytes for t in tensors.values()) / 2**20


FAST_TUNING = instance(FAST.tuning, Distillation)
Net = TypeVar("Net", bound=nn.Module)


def in_channels_last(module: Net) -> Net:
    """The module, with its weights in the order of channels last.

    The types of torch lack this argument.
    """
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def training_step(module: nn.Module, images: Tensor, labels: Tensor) -> Step:
    """Forward, cross-entropy, backward and update of a module alone."""
    optimizer = FAST_TUNING.optimizer.build(module)  # Adam; of a plain module, one rate for all

    def step() -> None:
        module.train()
        optimizer.zero_grad()
        F.cross_entropy(module(images), labels).backward()
        optimizer.step()

    return step


def measured(spec: str) -> dict[str, Any]:
    """Times and memory of the four steps on one network, or why it is skipped."""
    try:
        plain = load_model(spec, RANDOM).module
    except UsageError as error:  # raised in a child process it would be lost
        return {"skipped": str(error)}
    random = stream(0, "scale")
    images = torch.randn(BATCH, 3, 224, 224, generator=random)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (BATCH,), generator=random)
    teacher = capture(plain, images[:1])
    batch = Batch((images,), labels, teacher.network(images))
    student = build_student(teacher, Scheme(Bits(4, 4), FAST.placement), quantizers=LSQ)
    calibrate_(student, [batch], steps=1)
    in_channels_last(plain)

    # With the teacher's logits known and the cross-entropy alone, tuning asks the student only.
    alone = replace(FAST_TUNING, cross_entropy=1.0, distillation=0.0, features=0.0)

    def tuning(config: Distillation) -> None:
        tune_(student, teacher, [batch], config, first_step=0, total_steps=1)

    steps: dict[str, Step] = {
        "float": training_step(plain, images, labels),
        "student": training_step(student, images, labels),
        "parts": lambda: tuning(alone),
        "tuning": lambda: tuning(FAST_TUNING),
    }
    tensors = {
        "float": mebibytes(plain),
        "student": mebibytes(student),
        "parts": mebibytes(student),
        "tuning": mebibytes(student, teacher.network),
    }
    rises = {name: in_child(partial(peak_rise, step)) for name, step in steps.items()}
    return {
        "parameters": sum(p.numel() for p in plain.parameters()),
        "tensors_mib": tensors,
        "step_mib": rises,
        "ms": measure(steps, ROUNDS),
    }


def main(wanted: str) -> None:
    """Measure the networks whose name contains a word; the others' results stay."""
    warnings.simplefilter("ignore")  # the libraries' own
    torch.set_num_threads(1)
    keep_freed_memory_()  # as the program does, for all four
    kept = define_missing_operators()  # they are there while it lives
    rows = json.loads(FILE.read_text())["networks"] if FILE.exists() else {}
    for spec in NETWORKS:
        if wanted not in spec:
            continue
        row = in_child(partial(measured, spec))
        if "skipped" in row:
            print(f"{spec}: skipped, {row['skipped']}", flush=True)
            continue
        rows[spec] = row
        document = {"batch": BATCH, "rounds": ROUNDS, "torch": torch.__version__, "networks": rows}
        FILE.write_text(json.dumps(document, indent=1) + "\n")
        print(json.dumps(row), flush=True)
    del kept
