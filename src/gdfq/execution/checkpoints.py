"""Checkpoints: the registered parts of a run, written regularly, so that it can resume.

All parts (streams, student, optimizer, ...) are consistent with one another after a step that the
listener received. They are then written into one new file, whose name contains the hash of its
contents. The file before it is kept. What has not changed since an earlier checkpoint is not
written again (`gdfq.execution.pieces`).
"""

import json
import re
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gdfq.errors import GdfqWarning, UsageError, first_line
from gdfq.execution.checkpointer import Part
from gdfq.execution.pieces import Pieces
from gdfq.execution.progress import Listener, Step
from gdfq.files.atomic import make_folder, remove_partial, write_atomically
from gdfq.files.states import Stateful, all_finite, differences, name_of
from gdfq.files.untrusted import within

INTERVAL = 60.0
"""Seconds between two checkpoints of one stage."""
_MAX_TIME_SHARE = 0.02
"""Largest share of the time that checkpoints may take: a slow one delays the next one."""
_MAX_BYTES_PER_SECOND, _MAX_WAIT = 200_000, 600.0
"""What checkpoints may write on average, apart from what is written once, and the longest time in
seconds that a large one delays the next one for this reason."""
_CHECKPOINT = re.compile(r"checkpoint-(\d{6,})-([0-9a-f]{32})\.safetensors")
_LOCK = ".lock"


class Checkpoints:
    """A checkpointer that writes into a folder, and resumes from what it finds there.

    No other checkpointer, of this process or another, may write into the folder within the `with`
    block. The lock of a process that died is free.

    Args:
        folder: The folder.
        interval: Minimum time between two checkpoints, in seconds.
        writes: Whether it writes checkpoints, or only resumes from them.
        clock: The clock, in seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        interval: float = INTERVAL,
        writes: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self._interval, self._clock, self._writes = interval, clock, writes
        self._lock = FileLock(folder / _LOCK, timeout=0, thread_local=False)
        self._last, self._cost, self._bytes = clock(), 0.0, 0
        self.seconds = 0.0
        """Seconds that checkpoints have taken so far."""
        self._settings: dict[str, Any] | None = None
        self._parts: dict[str, Stateful] = {}
        self._found: dict[str, Any] = {}  # states of parts that are not registered yet
        self._kept: list[tuple[Path, set[str]]] = []
        self._pieces = Pieces(folder)
        self._trees = 0  # bytes written, apart from pieces

    @property
    def written(self) -> int:
        """Bytes that were written so far."""
        return self._trees + self._pieces.written

    @classmethod
    def of(cls, folder: "str | Path | Checkpoints", *, writes: bool = True) -> "Checkpoints":
        return folder if isinstance(folder, Checkpoints) else cls(Path(folder), writes=writes)

    def __enter__(self) -> "Checkpoints":
        """Lock the folder.

        Raises:
            UsageError: It cannot be written, or another run uses it.
        """
        if self._writes:
            make_folder(self.folder)
            lock = within(self.folder, self.folder / _LOCK)
            try:
                self._lock.acquire()
            except Timeout:
                raise UsageError(
                    "one run at a time may write its checkpoints into a folder; another one is "
                    f"using {self.folder}. Wait until it has finished, or choose another folder."
                ) from None
            except OSError as error:
                raise UsageError(
                    f"{lock} must be a file that can be written: {first_line(error)}. Remove it."
                ) from error
        return self

    def __exit__(self, *stopped: object) -> None:
        self._parts, self._found = {}, {}  # they hold the images of the run
        self._lock.release()

    def exists(self) -> bool:
        """Return whether there is a checkpoint, damaged or not."""
        return bool(self._files())

    def begin(self, settings: Mapping[str, Any], around: Mapping[str, Any]) -> None:
        """Read the newest checkpoint that is not damaged, if there is one.

        Args:
            settings: Settings that must be those of the checkpoint.
            around: Versions and hardware; a difference is a warning.

        Raises:
            UsageError: It belongs to a run with other settings, all checkpoints are damaged, or
                the folder cannot be written.
        """
        if self._writes:
            make_folder(self.folder)
            remove_partial(self.folder)
        found = self._read_newest()
        if found is not None:
            self._take(found, settings, around)
        self._settings = {"settings": dict(settings), "around": dict(around)}

    def recorded(self, name: str) -> Mapping[str, Any] | None:
        """Return the state of a part in the newest checkpoint that is not damaged.

        It is read before the run begins, and may be that of a run with other settings, which
        `begin` refuses.

        Raises:
            UsageError: All checkpoints are damaged, or the part is none.
        """
        found = self._read_newest()
        state = None if found is None else found["parts"].get(name)
        if not (state is None or isinstance(state, Mapping)):
            raise UsageError(
                f"a checkpoint must belong to the run that resumes; in {self.folder} the state of "
                f"the {name} does not fit. Remove the folder to restart."
            )
        return state

    def _take(
        self, found: dict[str, Any], settings: Mapping[str, Any], around: Mapping[str, Any]
    ) -> None:
        """Resume from a checkpoint."""
        if changed := _changes(found["settings"], settings):
            raise UsageError(
                f"a run resumes with the settings that it started with; of the one in "
                f"{self.folder} {changed}. Use the old settings, or start in another folder."
            )
        if changed := _changes(found["around"], around):
            _warn(f"the result may differ in its last bits from an uninterrupted run: {changed}.")
        self._found = found["parts"]
        for name, part in self._parts.items():
            self._restore_(name, part)

    def register(self, name: str, part: Part) -> Part:
        self._parts[name] = part
        self._restore_(name, part)
        return part

    def _restore_(self, name: str, part: Stateful) -> None:
        if name not in self._found:
            return
        try:
            part.load_state_dict(self._found.pop(name))
        except (LookupError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise UsageError(
                f"a checkpoint must belong to the run that resumes; in {self.folder} the state of "
                f"the {name} does not fit: {first_line(error)}. Remove the folder to restart."
            ) from error

    def unregister(self, *names: str) -> None:
        for name in names:
            self._parts.pop(name, None)
            self._found.pop(name, None)

    def listening(self, listener: Listener) -> Listener:
        """Return a listener that also writes a checkpoint when one is due or `listener` raises.

        None is due at the last step of a stage, because the next one follows soon.
        """

        def receive(step: Step) -> None:
            try:
                listener(step)
            except BaseException:
                self.save()
                raise
            if step.index < step.total and self._since() >= self._wait():
                self.save()

        return receive

    def _wait(self) -> float:
        """Return the minimum time between the last checkpoint and the next one, in seconds."""
        writing = min(self._bytes / _MAX_BYTES_PER_SECOND, _MAX_WAIT)
        return max(self._interval, self._cost / _MAX_TIME_SHARE, writing)

    def stage_ends(self) -> None:
        if self._since() >= self._cost / _MAX_TIME_SHARE:
            self.save()

    def save(self) -> None:
        """Write a checkpoint now.

        A failure to write is a warning: the run in memory is worth more than its copy. A state with
        NaN or infinity is not written.
        """
        if self._settings is None or not self._writes:
            return
        started = self._clock()
        states = {name: part.state_dict() for name, part in self._parts.items()}
        if all_finite(states):
            try:
                self._write({**self._settings, "parts": {**self._found, **states}})
            except OSError as error:
                _warn(
                    f"no checkpoint was written into {self.folder}: {error.strerror or error}. "
                    "The run continues; if it stops now, it resumes from the checkpoint before."
                )
        self._last = self._clock()
        self._cost = self._last - started
        self.seconds += self._cost

    def remove(self) -> None:
        """Remove the folder: the run has finished."""
        for path in [*self._files(), self.folder / _LOCK]:
            path.unlink(missing_ok=True)
        self._pieces.prune(set())
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _since(self) -> float:
        return self._clock() - self._last

    def _files(self) -> list[Path]:
        """Return all checkpoints, the newest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _CHECKPOINT.fullmatch(path.name)]
        return sorted(found, reverse=True)

    def _write(self, state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        data, used, written = self._pieces.encode(state)
        number = 1 + max((int(path.name.split("-")[1]) for path in self._files()), default=0)
        path = self.folder / f"checkpoint-{number:06}-{name_of(data)}.safetensors"
        write_atomically(path, data)
        self._bytes = written + len(data)
        self._trees += len(data)
        self._kept = [*self._kept[-1:], (path, used)]
        self._prune()

    def _prune(self) -> None:
        """Remove the files that neither this checkpoint nor the one before it needs."""
        kept = {path.name for path, _ in self._kept}
        for path in self._files():
            if path.name not in kept:
                path.unlink(missing_ok=True)
        self._pieces.prune(set().union(*(used for _, used in self._kept)))

    def _read_newest(self) -> dict[str, Any] | None:
        problems: list[str] = []
        for path in self._files():
            try:
                state, used = self._read(path)
            except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
                problems.append(f"{path.name}: {first_line(error)}")
                continue
            self._kept = [(path, used)]
            if problems:
                _warn(f"resuming from the checkpoint before: {'; '.join(problems)}.")
            return state
        if problems:
            raise UsageError(
                f"one checkpoint in {self.folder} must be undamaged; none is: "
                f"{'; '.join(problems)}. Remove the folder to restart."
            )
        return None

    def _read(self, path: Path) -> tuple[dict[str, Any], set[str]]:
        """Read a checkpoint.

        Returns:
            Its state, and the names of the pieces it uses.

        Raises:
            ValueError: It is damaged. Contents of another structure raise other errors.
        """
        match = _CHECKPOINT.fullmatch(path.name)
        assert match is not None
        state, used = self._pieces.decode(self._pieces.contents(path, match[2]))
        parts = {key: state[key] for key in ("settings", "around", "parts")}
        if not all(isinstance(part, dict) for part in parts.values()):
            raise ValueError("its parts are not dictionaries")
        return parts, used


def _changes(old: dict[str, Any], new: Mapping[str, Any]) -> str:
    found = differences(old, json.loads(json.dumps(new)))  # as a file has them
    return "; ".join(f"{name} was {was!r} and is {now!r}" for name, (was, now) in found.items())


def _warn(message: str) -> None:
    warnings.warn(message, GdfqWarning, stacklevel=3)
