"""Pieces of checkpoints: files that hold what does not change, each written once.

A frozen part is a piece. So are all large tensors of one checkpoint together that no piece has yet:
later checkpoints name those of them that are still the same.
"""

import re
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from gdfq.files.atomic import write_atomically
from gdfq.files.states import (
    Entry,
    Frozen,
    digest_of,
    from_bytes,
    name_of,
    to_bytes,
    with_tensors,
)
from gdfq.files.untrusted import within

_PIECE = re.compile(r"piece-([0-9a-f]{32})\.safetensors")
_MIN_BYTES = 2**15
"""Smaller tensors are written with each checkpoint."""


class Pieces:
    """The pieces in a folder.

    Args:
        folder: The folder; it exists when pieces are written.

    Attributes:
        written: Bytes that were written so far.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self.written = folder, 0
        self._names: weakref.WeakKeyDictionary[Frozen, str] = weakref.WeakKeyDictionary()
        self._entries: dict[str, Frozen] = {}  # the piece, without its value, of each stored tensor

    def encode(self, state: Any) -> tuple[bytes, set[str], int]:
        """Write the pieces of a state that are not written yet.

        Args:
            state: A tree as `gdfq.files.states.Stateful` describes it.

        Returns:
            The state in bytes, which name the pieces; the names of the pieces; and how many bytes
            were written for tensors that are not frozen.

        Raises:
            OSError: A piece cannot be written.
        """
        used: set[str] = set()

        def name(part: Frozen) -> str:
            if not self._is_stored(part):
                data = to_bytes(part.value, name)
                self._names[part] = name_of(data)
                write_atomically(self._path(self._names[part]), data)
                self.written += len(data)
            used.add(self._names[part])
            return self._names[part]

        self._entries = {
            key: piece for key, piece in self._entries.items() if self._is_stored(piece)
        }
        fresh: dict[str, Tensor] = {}
        piece = Frozen(fresh)
        copies: Counter[str] = Counter()

        def entry(tensor: Tensor) -> Tensor | Entry:
            if tensor.nbytes < _MIN_BYTES:
                return tensor
            digest = digest_of(tensor)
            copies[digest] += 1
            key = f"{digest}-{copies[digest]}"
            if key not in self._entries:
                fresh[key], self._entries[key] = tensor, piece
            return Entry(self._entries[key], key)

        try:
            data = to_bytes(with_tensors(state, entry), name)
        finally:
            piece.value = None  # the tensors will change
        written = self._path(self._names[piece]).stat().st_size if fresh else 0
        return data, used, written

    def decode(self, data: bytes) -> tuple[Any, set[str]]:
        """Read a state and its pieces; the inverse of `encode`.

        Returns:
            The state, and the names of its pieces.

        Raises:
            ValueError: A piece is damaged. Contents of another structure raise other errors.
        """
        read: dict[str, Frozen] = {}

        def piece(name: str) -> Frozen:
            path = self._path(name)
            if not _PIECE.fullmatch(path.name):
                raise ValueError(f"a piece cannot have the name {name!r}")
            if name not in read:  # read once: references between pieces could grow exponentially
                read[name] = Frozen(from_bytes(self.contents(path, name), piece))
                self._names[read[name]] = name
            return read[name]

        state = from_bytes(data, piece)
        for name, part in read.items():
            if isinstance(part.value, dict):
                empty = Frozen(None)
                self._names[empty] = name
                self._entries |= dict.fromkeys(map(str, part.value), empty)
        return state, set(read)

    def contents(self, path: Path, name: str) -> bytes:
        """Return the contents of a file in the folder.

        Args:
            path: The file.
            name: The hash of its contents.

        Raises:
            ValueError: It has another hash.
        """
        data = within(self._folder, path).read_bytes()
        if name_of(data) != name:
            raise ValueError("it is truncated or was changed")
        return data

    def prune(self, needed: set[str]) -> None:
        """Remove all pieces but those of the needed names."""
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                match = _PIECE.fullmatch(path.name)
                if match and match[1] not in needed:
                    path.unlink(missing_ok=True)

    def _is_stored(self, part: Frozen) -> bool:
        return part in self._names and self._path(self._names[part]).exists()

    def _path(self, name: str) -> Path:
        return self._folder / f"piece-{name}.safetensors"
