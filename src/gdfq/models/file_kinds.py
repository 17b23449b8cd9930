"""What a file is that is given for weights, from its first bytes and names inside, without code."""

from pathlib import Path
from zipfile import BadZipFile, ZipFile

_ZIP = b"PK\x03\x04"
_BEGINNINGS = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file of Keras or TensorFlow, which gdfq cannot read"),
    (b"GGUF", "a GGUF file, which gdfq cannot read"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"version https://git-lfs", "a pointer of Git LFS and not the file itself: run git lfs pull"),
    (b"<!DOCTYPE html", "a web page and not the file: download it again"),
    (b"<html", "a web page and not the file: download it again"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
)
_SUFFIXES = {
    ".onnx": "an ONNX file, which is a network and no state dict",
    ".pb": "a TensorFlow graph, which gdfq cannot read",
    ".tflite": "a LiteRT (TensorFlow Lite) file, which gdfq cannot read",
    ".ckpt.index": "a TensorFlow checkpoint, which gdfq cannot read",
    ".mlmodel": "a Core ML file, which gdfq cannot read",
    ".engine": "a TensorRT engine, which gdfq cannot read",
    ".msgpack": "a Flax checkpoint, which gdfq cannot read",
    ".keras": "a Keras file, which gdfq cannot read",
    ".h5": "an HDF5 file of Keras or TensorFlow, which gdfq cannot read",
    ".index.json": "the index of weights in several files: merge them into one safetensors file",
}
_PATHS_INSIDE = (
    ("constants.pkl", "a TorchScript archive"),
    ("code/", "a TorchScript archive"),
    ("serialized_exported_program.json", "a program of torch.export"),
    ("models/model.json", "a program of torch.export"),
    ("model.weights.h5", "a Keras file, which gdfq cannot read"),
)
_WAYS_OUT = {
    "a TorchScript archive": "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt') makes a "
    "state dict of it, where you trust the file",
    "a program of torch.export": "it is a MODEL with its weights: give it as MODEL (.pt2)",
}
_FIRST_BYTES = 64
_WEIGHTS = frozenset((".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".tar", ".pkl"))


def foreign_kind(path: Path) -> str | None:
    """Return what a file or folder is, if it is certainly no state dict, and the way out."""
    try:
        return _foreign_kind(path)
    except (OSError, ValueError):  # such as a name that no file can have
        return None


def holds_weights(path: Path) -> bool:
    """Whether a file is there and has the suffix of weights."""
    try:
        return path.suffix in _WEIGHTS and path.is_file()
    except (OSError, ValueError):
        return False


def _foreign_kind(path: Path) -> str | None:
    if path.is_dir():
        if (path / "saved_model.pb").exists():
            return "a SavedModel of TensorFlow, which gdfq cannot read"
        return None
    if not path.is_file():
        return None
    with path.open("rb") as file:
        begin = file.read(_FIRST_BYTES)
    if begin.startswith(_ZIP):
        kind = _kind_of_zip(path)
        return f"{kind}: {_WAYS_OUT[kind]}" if kind in _WAYS_OUT else kind
    for beginning, kind in _BEGINNINGS:
        if begin.lower().startswith(beginning.lower()):
            return kind
    if begin[4:8] == b"TFL3":
        return _SUFFIXES[".tflite"]
    return next((kind for end, kind in _SUFFIXES.items() if path.name.lower().endswith(end)), None)


def _kind_of_zip(path: Path) -> str | None:
    try:
        with ZipFile(path) as archive:
            names = archive.namelist()
    except (BadZipFile, ValueError, OSError):
        return None
    # The names of a torch archive begin with a folder of any name.
    inside = [name.partition("/")[2] for name in names]
    for place, kind in _PATHS_INSIDE:
        if any(name.startswith(place) for name in (*names, *inside)):
            return kind
    if names and all(name.endswith(".npy") for name in names):
        return "an .npz file of NumPy arrays"
    return None


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, whatever it is called."""
    with path.open("rb") as file:
        begin = file.read(10)
    length = int.from_bytes(begin[:8], "little")
    return begin[8:9] == b"{" and 0 < length <= path.stat().st_size
