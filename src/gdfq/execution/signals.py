"""Signals that ask a process to stop become an error at a point where it can."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType


class StoppedError(BaseException):
    """The process was asked to stop; `code` is the exit code that says by which signal.

    No error: as with KeyboardInterrupt, what catches every Exception must let it pass.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Within, SIGINT and SIGTERM are noted; what is yielded raises StoppedError when one came.

    A second one raises at once, wherever the program is. In another thread than the main one,
    which alone may handle signals, nothing is changed.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (a handler's form)
        if came:
            raise StoppedError(number)
        came.append(number)

    def check() -> None:
        if came:
            raise StoppedError(came[0])

    if current_thread() is not main_thread():
        yield check
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
