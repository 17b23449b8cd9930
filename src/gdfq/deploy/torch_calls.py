"""Calls of a .pt2 file that are timed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gdfq.deploy.calls import Call, Shapes, noise


def program_calls(file: Path, threads: int) -> Callable[[Shapes], Call]:
    """Load a program that gdfq wrote to be timed (see `gdfq.deploy.calls.Load`)."""
    torch.set_num_threads(threads)
    program = torch.export.load(file)
    module: Any = program.module(check_guards=False)
    examples, _ = program.example_inputs or ((), {})

    def prepare(shapes: Shapes) -> Call:
        inputs = [
            torch.from_numpy(noise(shape, "float32")).to(example.dtype)
            if example.dtype.is_floating_point
            else torch.zeros(shape, dtype=example.dtype)
            for example, shape in zip(examples, shapes, strict=True)
        ]

        @torch.no_grad()
        def call() -> object:
            return module(*inputs)

        return call

    return prepare
