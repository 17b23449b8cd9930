"""Untrusted files: limits on what they may cost, and how they are read within these limits.

A small file may claim to hold a lot of data. Sizes are compared with the file, or with the limits
here, before memory is allocated. A failure raises ValueError, or the error of the library; callers
add which file it was.
"""

import json
import math
import os
import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Collection, Iterator, Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import numpy as np

from gdfq.errors import UsageError

MAX_IMAGE_PIXELS = 2**26
"""Maximum pixels of an image file: 8192 x 8192."""
MAX_RESIZED_PIXELS = 2**24
"""Maximum pixels of a resized image. Resizing can enlarge long and thin images."""
MAX_INPUT_ELEMENTS = 2**24
"""Maximum elements of one input of a network: 3 x 2048 x 2048 fits."""
MAX_TENSOR_ELEMENTS = 2**28
"""Maximum elements of one tensor inside a stored network, for one image: 1 GiB of floats."""
MAX_JSON_DEPTH = 100
"""Maximum depth of nested lists and objects."""
_MAX_UNPACKED_BYTES, _MAX_UNPACKED_RATIO = 2**26, 100
"""Bytes that any archive may unpack to, and the maximum ratio to its own size for larger ones."""


def within(folder: Path, path: Path) -> Path:
    """Return `path`, a file or folder inside `folder`.

    Raises:
        UsageError: It is a symbolic link that leads out of the folder, a pipe or a device.
    """
    if path.is_symlink():
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(os.path.realpath(folder)):
            raise UsageError(
                f"files that are read from a folder must be inside it; {path} is a symbolic link "
                f"that leads out of it, to {target}. Copy that into the folder, or give that path."
            )
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UsageError(
            f"a folder must contain only files and folders; {path} is a pipe or a device. "
            "Remove it."
        )
    return path


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not valid JSON, is nested too deeply, or holds text that is not Unicode.
    """
    return parse_json(path.read_bytes())


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text.

    Raises:
        ValueError: It is not valid JSON, is nested too deeply, or holds text that is not Unicode.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if isinstance(value, dict | list):
        _check_depth(value, MAX_JSON_DEPTH)
    _check_unicode(value)
    return value


def _check_unicode(value: Any) -> None:
    """Raise ValueError for half of a surrogate pair, which JSON can spell and no file can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"it holds {error.object[error.start]!r}, which is no character"
        ) from error


def _check_depth(value: Any, levels: int) -> None:
    """Raise ValueError if a value is nested too deeply to be written, which needs more stack."""
    if not levels:
        raise ValueError("it is nested too deeply")
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            _check_depth(inner, levels - 1)


def check_shape(shape: Sequence[int]) -> None:
    """Check the shape of one input of a network.

    Raises:
        UsageError: It has more than `MAX_INPUT_ELEMENTS` elements.
    """
    if math.prod(shape) > MAX_INPUT_ELEMENTS:
        raise UsageError(
            f"one input may have at most {MAX_INPUT_ELEMENTS:,} elements; "
            f"{'x'.join(map(str, shape))} has {math.prod(shape):,}. Give the shape of one image."
        )


def check_pixels(width: int, height: int, limit: int = MAX_IMAGE_PIXELS) -> None:
    """Raise ValueError if an image of this width and height has more than `limit` pixels."""
    if width * height > limit:
        raise ValueError(f"{width} x {height} pixels are more than {limit:,}")


def read_npz(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """Read those of the named arrays that an .npz file has, or all its arrays.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged, holds objects, or unpacks to more than 64 MiB and 100 times its
            size. The zip library raises errors of its own.
    """
    with ZipFile(path) as archive:
        members = {
            info.filename.removesuffix(".npy"): info
            for info in archive.infolist()
            if names is None or info.filename.removesuffix(".npy") in names
        }
        size = sum(info.file_size for info in members.values())
        if size > max(_MAX_UNPACKED_BYTES, _MAX_UNPACKED_RATIO * path.stat().st_size):
            raise ValueError(f"it would unpack to {size:,} bytes, which its size does not explain")
        return {name: _array(archive, info) for name, info in members.items()}


_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _array(archive: ZipFile, info: ZipInfo) -> np.ndarray[Any, Any]:
    if info.compress_type not in (
        ZIP_STORED,
        ZIP_DEFLATED,
    ):  # other methods allocate memory of their own
        raise ValueError(f"{info.filename} is compressed in another way than numpy's")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"{info.filename} is of version {version}")
        shape, _, dtype = _HEADERS[version](file)
        declared, there = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
        if declared != there:
            raise ValueError(f"{info.filename} says it has {declared} bytes; it has {there}")
    with archive.open(info) as file:
        array: np.ndarray[Any, Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


_ZIP = b"PK\x03\x04"
_HARMLESS = re.compile(
    r"collections (OrderedDict|Counter)|(builtins|__builtin__) (set|complex)|_codecs encode"
    r"|torch (\w+Storage|Size|device|bool|(b?float|complex|u?int)\d+\w*)"
    r"|torch\.storage UntypedStorage|torch\.serialization _get_layout"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
)
"""What the pickled part of a state dict may call. `weights_only` allows more: `bytearray` and
`Tensor` take a length, so a few bytes can request any amount of memory."""


def check_torch_file(path: Path) -> None:
    """Check that reading a torch file takes no more memory than its size explains.

    Raises:
        ValueError: The file is compressed, claims more bytes than it has, or calls a function that
            a state dict does not need.
    """
    for name in _calls(path):
        if not _HARMLESS.fullmatch(name):
            raise ValueError(f"it calls {name!r}, which a state dict does not")


_NEVER = re.compile(
    r"STACK_GLOBAL|INST|EXT\d|(os|posix|nt|sys|subprocess|shutil|socket|runpy|importlib|ctypes"
    r"|io|_io|pty|code|webbrowser)(\.\w+)* .*"
    r"|(builtins|__builtin__) (eval|exec|compile|open|__import__|bytearray)"
    r"|torch(\.\w+)* \w*(Tensor|Storage)\w*"
    r"|torch\.(hub|distributed|nested)(\.\w+)* .*|torch\.(_utils|_tensor|storage) .*"
)
"""What no checkpoint calls but to run code or to take memory."""


def foreign_names(path: Path) -> set[str]:
    """The classes and functions, as "module.name", of a torch file that a state dict has not.

    Raises:
        ValueError: It calls what no checkpoint needs, or could take memory without end.
    """
    found = set()
    for name in _calls(path):
        if _HARMLESS.fullmatch(name):
            continue
        module, _, attribute = name.partition(" ")
        # Protocol 2 has the names of Python 2, such as __builtin__.
        module, attribute = NAME_MAPPING.get(
            (module, attribute), (IMPORT_MAPPING.get(module, module), attribute)
        )
        if _NEVER.fullmatch(name) or _NEVER.fullmatch(f"{module} {attribute}"):
            raise ValueError(f"it calls {name!r}, which a state dict does not")
        found.add(f"{module}.{attribute}")
    return found


def _calls(path: Path) -> Iterator[str]:
    """What the pickles of a torch file call, without running them.

    Raises:
        ValueError: The file says it holds more bytes than it has.
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:  # the format before torch 1.6, which begins with pickles
            # A file allocates any length that a pickle asks it to read; a mapping does not.
            with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                for _ in range(5):  # magic number, version, system, object, names of its storages
                    yield from _names(content)
            return
    with ZipFile(path) as archive:
        members = archive.infolist()
        packed = any(info.compress_type != ZIP_STORED for info in members)
        if packed or sum(info.file_size for info in members) > path.stat().st_size:
            raise ValueError("it says it holds more bytes than it has")
        for info in members:
            if info.filename.lower().endswith("data.pkl"):
                with archive.open(info) as member:
                    yield from _names(member)


def _names(file: Any) -> Iterator[str]:
    """Yield what a pickle calls, as "module name", up to the end of the pickle."""
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            yield str(argument)
        elif opcode.name in {"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}:
            yield opcode.name


_LENGTH_BYTES = 8
"""Bytes of the field that holds the length of a safetensors header."""


def header_bytes(data: bytes) -> int:
    """Return how many bytes of a safetensors file precede its tensors."""
    return _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")


def safetensors_header(data: bytes) -> bytes:
    """Return the JSON header of a safetensors file."""
    return data[_LENGTH_BYTES : header_bytes(data)]
