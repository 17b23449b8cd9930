"""What one process or several compute from one seed.

`python -m support.group_figures FOLDER SIZE ...` writes it for groups of these sizes.
"""

import multiprocessing
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from support import networks
from torch import Tensor, nn

from gdfq.execution.context import Context
from gdfq.execution.distributed import Group, joined
from gdfq.functional.grid import Bits
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.capture import Captured, capture
from gdfq.graph.tensors import flat_module, tensors_of
from gdfq.optim import SgdConfig
from gdfq.quantizers.family import LSQ
from gdfq.recipes import FAST, PAPER, Recipe
from gdfq.sources.base import Batch
from gdfq.sources.generator import Conditioning, GeneratorSource
from gdfq.sources.pixels import OptimisedSource
from gdfq.sources.pool import ImagePool
from gdfq.sources.spectral import SpectralSource
from gdfq.sources.stream import Stream
from gdfq.student.build import Student, build_student
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_
from gdfq.tuning.distill import Distillation, tune_

STEPS = 20
CONDITIONINGS: tuple[Conditioning, ...] = ("label-embedding", "conditional-batch-norm")
POOL = ImagePool(SpectralSource(batch=8, iterations=4), images=40, batch=8)


def figures(group: Group) -> dict[str, Any]:
    teacher = capture(networks.make("Residual"), networks.images(1))
    pool = POOL.stream(teacher, steps=STEPS, context=Context(seed=1, group=group))
    batches = list(pool)
    folded = fold_batch_norms(teacher).network
    perturbed: dict[str, Tensor] = {
        name: nn.Parameter(1.1 * t + 0.02) for name, t in tensors_of(folded).items()
    }
    float_student = Student(flat_module(folded.graph, perturbed)).requires_grad_(True)
    quantized = build_student(teacher, Scheme(Bits(4, 4), "full"), quantizers=LSQ)
    paper = build_student(teacher, Scheme(Bits(4, 4), "relu"))
    moving = build_student(teacher, Scheme(Bits(4, 4), "relu"), fixed_statistics=False)
    for student in (quantized, paper, moving):
        calibrate_(student, batches[:2], steps=2)
    config = Distillation(
        SgdConfig(lr=1e-2), temperature=4.0, reduction="batch", features=1.0, difficulty=0.9
    )
    fast = replace(_distillation(FAST), schedule=config.schedule)
    return {
        "pool": pool.images(POOL.images),
        "optimised": [
            batch.images
            for batch in OptimisedSource(batch=4, iterations=5).stream(
                teacher, steps=3, context=Context(seed=1, group=group)
            )
        ],
        "generators": {
            kind: _generated(teacher, kind, torch.float32, 1, group) for kind in CONDITIONINGS
        },
        "long": {
            kind: _generated(teacher, kind, torch.float64, STEPS, group) for kind in CONDITIONINGS
        },
        "float": _tuned(float_student, teacher, batches, config, group),
        "quantized": _tuned(quantized, teacher, batches[:1], fast, group),
        "paper": _tuned(paper, teacher, batches[:1], _distillation(PAPER), group),
        "moving": _tuned(
            moving,
            teacher,
            batches[:1],
            replace(_distillation(PAPER), fixed_statistics=False),
            group,
        ),
    }


def difference(a: Any, b: Any) -> float:
    """The difference of two trees of tensors, relative to the norm of each."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max(difference(a[key], b[key]) for key in a)
    if isinstance(a, list):
        assert len(a) == len(b)
        return max(map(difference, a, b))
    return float((a - b).norm() / a.norm())


def _distillation(recipe: Recipe) -> Distillation:
    assert isinstance(recipe.tuning, Distillation)
    return recipe.tuning


def _generated(
    teacher: Captured, kind: Conditioning, dtype: torch.dtype, steps: int, group: Group
) -> dict[str, Any]:
    teacher.network.to(dtype)
    source = GeneratorSource(batch=16, conditioning=kind)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return _of_stream(source.stream(teacher, steps=steps, context=Context(seed=1, group=group)))
    finally:
        torch.set_default_dtype(usual)
        teacher.network.to(usual)


def _of_stream(stream: Stream) -> dict[str, Any]:
    first = next(stream)
    generator = stream._parts["generator"]
    assert isinstance(generator, nn.Module)
    gradients = _flat(generator)
    batches = [first, *stream]
    return {
        "images": first.images,
        "logits": first.teacher_logits,
        "gradients": gradients,
        "losses": torch.tensor([[*map(float, batch.losses.values())] for batch in batches]),
    }


def _tuned(
    student: Student, teacher: Captured, batches: list[Batch], config: Distillation, group: Group
) -> dict[str, Any]:
    gradients: list[Tensor] = []
    losses: list[list[float]] = []

    def note(step: Any) -> None:
        if not losses:
            gradients.append(_flat(student))
        losses.append([float(value) for value in step.losses.values()])

    tune_(student, teacher, batches, config, first_step=0, total_steps=len(batches), context=Context(listener=note, group=group))  # fmt: skip
    weights = torch.cat([p.detach().flatten() for p in student.parameters()])
    return {"gradients": gradients[0], "losses": torch.tensor(losses), "weights": weights}


def _flat(module: nn.Module) -> Tensor:
    """All gradients as one vector: some of its parts are 0 but for rounding."""
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def _in_group(folder: Path, rank: int, size: int, port: int) -> None:
    """Compute as one of `size` processes, with the environment that torchrun gives each."""
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "figures", "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with joined(torch.device("cpu")) as group:
        assert group.size == size
        torch.save(figures(group), folder / f"{size}.{rank}.pt")


def main(folder: Path, sizes: list[int]) -> None:
    """Write the figures of groups of processes, forked from one that has captured once."""
    capture(networks.make("Residual"), networks.images(1))
    fork = multiprocessing.get_context("fork")
    for size in sizes:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [
            fork.Process(target=_in_group, args=(folder, rank, size, port)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if codes := [process.exitcode for process in processes if process.exitcode]:
            sys.exit(f"of {size} processes some ended with {codes}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(size) for size in sys.argv[2:]])
