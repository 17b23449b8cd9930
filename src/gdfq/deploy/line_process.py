"""Processes of this package that answer a JSON object a line with one, and their client.

A runtime in a process of its own neither disturbs others nor takes this process with it when it
ends. An answer `{"error": ...}` says why what was asked for cannot be done.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from types import TracebackType
from typing import Any

from gdfq.errors import GdfqError, UsageError


def answer_lines(answer: Callable[[dict[str, Any]], dict[str, object]]) -> None:
    """Answer each line of the standard input, in a process that `LineProcess` started.

    Args:
        answer: Returns the answer. Raises UsageError for what cannot be done.
    """
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except UsageError as error:
            found = {"error": str(error)}
        answers.write(f"{json.dumps(found)}\n")
        answers.flush()


class LineProcess:
    """A process that answers lines; it ends with the context."""

    def __init__(self, module: str, purpose: str) -> None:
        """Describe a process.

        Args:
            module: The module that it runs.
            purpose: What it must do, for errors: `LiteRT must run a.tflite`.
        """
        self.module = module
        self.purpose = purpose

    def __enter__(self) -> "LineProcess":
        self.errors = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(  # noqa: S603 (this interpreter, a module of this package)
            [sys.executable, "-P", "-m", self.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def ask(self, **asked: object) -> dict[str, Any]:
        """Ask for something and wait for the answer.

        Raises:
            UsageError: It cannot be done.
            GdfqError: The process ended.
        """
        self.send(**asked)
        return self.answer()

    def send(self, **asked: object) -> None:
        """Ask for something; `answer` waits for the answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{json.dumps(asked)}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to what was asked for first of all that has none yet."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UsageError(answer["error"])
        return answer

    def _ended(self) -> GdfqError:
        code = self.process.wait()
        self.errors.seek(0)
        last = self.errors.read().strip().splitlines()[-1:] or ["nothing"]
        return GdfqError(
            f"{self.purpose} in a process of its own; the process ended with exit code {code} and "
            f"wrote: {last[0]}."
        )
