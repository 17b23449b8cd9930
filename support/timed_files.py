"""Runtimes for the tests of `gdfq.deploy.benchmark`: their processes do what a file says."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gdfq.deploy.calls import Call, Shapes
from gdfq.errors import UsageError


def calls(file: Path, threads: int) -> Callable[[Shapes], Call]:
    """A call that takes the memory that the file says, and the time that `shapes` do."""
    held = np.ones(int(file.read_text()) * 2**20, np.uint8)

    def prepare(shapes: Shapes) -> Call:
        (batch, milliseconds), *_ = shapes

        def call() -> int:
            time.sleep(batch * milliseconds / threads / 1000)
            return int(held[0])

        return call

    return prepare


def ends(file: Path, _threads: int) -> Callable[[Shapes], Call]:
    """A runtime that takes its process with it."""
    print("cannot read", file.name, file=sys.stderr)
    os._exit(3)


def refuses(_file: Path, _threads: int) -> Callable[[Shapes], Call]:
    print("on standard output")
    raise UsageError("it must be another file.")
