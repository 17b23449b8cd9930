"""Tracing by torch: by one thread at a time, while no other computes, and without its warnings.

Two calls of `torch.export` at once fail. And while one runs, the whole process computes otherwise:
it switches oneDNN off and `torch.compiler.is_compiling` on, so that convolutions and Adam's updates
in other threads round differently. So threads that compute and one that traces take turns.
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
    """Many threads compute, or one traces; who waits to trace goes first."""

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
        """Within, no other thread traces."""
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
        """Within, this thread does not compute, so that others may trace."""
        if self._depth():
            self._leave()
        try:
            yield
        finally:
            if self._depth():
                self._enter()

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Within, no other thread computes or traces."""
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
def quiet_tracing() -> Iterator[None]:
    """Within, this thread alone traces; warnings, torch's deprecations mostly, are not shown."""
    with _TURNS.tracing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def beside_no_tracing(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """The function, during which no other thread traces unless a `giving_way` listener hears."""

    @wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with _TURNS.computing():
            return function(*args, **kwargs)

    return run


def giving_way(listener: Listener) -> Listener:
    """The listener, during which other threads may trace: a step has ended."""

    def heard(step: Step) -> None:
        with _TURNS.pausing():
            listener(step)

    return heard
