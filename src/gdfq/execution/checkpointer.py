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
    """Saves and restores the registered parts of a run, within its `with` block."""

    def __enter__(self) -> "Checkpointer": ...

    def __exit__(self, *stopped: object) -> None: ...

    def begin(self, settings: Mapping[str, Any], around: Mapping[str, Any]) -> None:
        """Identify the run, and read its checkpoint if there is one.

        Args:
            settings: Which run it is, as plain values. A checkpoint of another run is refused.
            around: What the rounding of the run depends on. Another value is a warning.
        """
        ...

    def recorded(self, name: str) -> Mapping[str, Any] | None:
        """Return the state of a part in the checkpoint, before the run begins; None without one."""
        ...

    def register(self, name: str, part: Part) -> Part:
        """Register a part, and restore its state if the run resumes. Returns the part."""
        ...

    def unregister(self, *names: str) -> None:
        """Drop these parts and their restored states."""
        ...

    def listening(self, listener: Listener) -> Listener:
        """Return the listener such that a checkpoint is written after it when one is due."""
        ...

    def stage_ends(self) -> None:
        """Write a checkpoint at the end of a stage, unless checkpoints take too much time."""
        ...


class NullCheckpointer:
    """The checkpointer that saves nothing."""

    def __enter__(self) -> "NullCheckpointer":
        return self

    def __exit__(self, *stopped: object) -> None:
        pass

    def begin(self, settings: Mapping[str, Any], around: Mapping[str, Any]) -> None:
        pass

    def recorded(self, name: str) -> Mapping[str, Any] | None:  # noqa: ARG002
        return None

    def register(self, name: str, part: Part) -> Part:  # noqa: ARG002
        return part

    def unregister(self, *names: str) -> None:
        pass

    def listening(self, listener: Listener) -> Listener:
        return listener

    def stage_ends(self) -> None:
        pass
