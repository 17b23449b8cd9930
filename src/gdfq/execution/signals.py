"""Signals that ask a process to stop raise an error at a point where the process can stop."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType


class StoppedError(BaseException):
    """The process was asked to stop. `code` is the exit code for the signal (128 + its number).

    It derives from BaseException, as KeyboardInterrupt does, so that `except Exception` does not
    catch it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Within this context SIGINT and SIGTERM are recorded instead of stopping the process.

    Yields:
        A function that raises StoppedError if a signal was received. A second signal raises it
        immediately. Only the main thread can handle signals; in other threads nothing changes.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (a handler's form)
        if received:
            raise StoppedError(number)
        received.append(number)

    def check() -> None:
        if received:
            raise StoppedError(received[0])

    if current_thread() is not main_thread():
        yield check
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
