"""The checkpointer of a run: what its parts are registered with, so that a run can resume.

The parts of a run (streams, student, optimizer, ...) are registered. After each step that a
listener receives, all registered parts are consistent with one another: that is when a checkpoint
is written.
"""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from gdfq.execution.progress import Listener
from gdfq.files.states import Stateful

Part = TypeVar("Part", bound=Stateful)


class Checkpointer(Protocol):
    """What keeps the parts of a run, within its `with` block."""

    def __enter__(self) -> "Checkpointer": ...

    def __exit__(self, *stopped: object) -> None: ...

    def begin(self, settings: Mapping[str, Any], around: Mapping[str, Any]) -> None:
        """Say which run it is (plain values), and what its rounding depends on."""
        ...

    def register(self, name: str, part: Part) -> Part:
        """Keep the part from now on. Of a run that goes on, it gets the state it had."""
        ...

    def unregister(self, *names: str) -> None:
        """Keep these parts no longer, nor what was found of them."""
        ...

    def listening(self, listener: Listener) -> Listener:
        """The listener, behind whom a checkpoint is written when it is time."""
        ...

    def stage_ends(self) -> None:
        """Write a checkpoint, unless that would take too much of the time."""
        ...


class NullCheckpointer:
    """The keeper that keeps nothing."""

    def __enter__(self) -> "NullCheckpointer":
        return self

    def __exit__(self, *stopped: object) -> None:
        pass

    def begin(self, settings: Mapping[str, Any], around: Mapping[str, Any]) -> None:
        pass

    def register(self, name: str, part: Part) -> Part:  # noqa: ARG002
        return part

    def unregister(self, *names: str) -> None:
        pass

    def listening(self, listener: Listener) -> Listener:
        return listener

    def stage_ends(self) -> None:
        pass
