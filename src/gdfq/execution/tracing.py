"""Tracing with torch.export: one thread at a time, and never while another thread computes.

Two concurrent calls of `torch.export` fail. While one call runs, it changes how the whole process
computes: it switches oneDNN off and `torch.compiler.is_compiling` on, so that convolutions and Adam
updates in other threads round differently. Therefore a thread that traces excludes all threads that
compute.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from gdfq.execution.progress import Listener, Step

Given = ParamSpec("Given")
Result = TypeVar("Result")


class _Turns:
    """A lock: many threads compute, or one thread traces. A waiting tracer has priority."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._computing, self._waiting, self._tracing = 0, 0, False
        self._mine = threading.local()

    def _depth(self) -> int:
        return getattr(self._mine, "depth", 0)

    def _enter(self) -> None:
        with self._change:
            self._change.wait_for(lambda: not self._tracing and not self._waiting)
            self._computing += 1

    def _leave(self) -> None:
        with self._change:
            self._computing -= 1
            self._change.notify_all()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within this context no other thread traces."""
        if not self._depth():
            self._enter()
        self._mine.depth = self._depth() + 1
        try:
            yield
        finally:
            self._mine.depth -= 1
            if not self._mine.depth:
                self._leave()

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Within this context this thread does not compute, so that other threads may trace."""
        if self._depth():
            self._leave()
        try:
            yield
        finally:
            if self._depth():
                self._enter()

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Within this context no other thread computes or traces."""
        with self.pausing():
            with self._change:
                self._waiting += 1
                try:
                    self._change.wait_for(lambda: not self._tracing and not self._computing)
                    self._tracing = True
                finally:
                    self._waiting -= 1
                    self._change.notify_all()
            try:
                yield
            finally:
                with self._change:
                    self._tracing = False
                    self._change.notify_all()


_TURNS = _Turns()


@contextmanager
def exclusive_tracing() -> Iterator[None]:
    """Within this context this thread alone traces. Warnings of torch are not shown."""
    with _TURNS.tracing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def without_concurrent_tracing(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Return the function such that no other thread traces while it runs.

    A listener made by `allowing_tracing` pauses this.
    """

    @wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with _TURNS.computing():
            return function(*args, **kwargs)

    return run


def allowing_tracing(listener: Listener) -> Listener:
    """Return the listener such that other threads may trace while it runs, after a step."""

    def receive(step: Step) -> None:
        with _TURNS.pausing():
            listener(step)

    return receive
