"""The saved student: one safetensors file with codes packed to their number of bits.

Its metadata has one entry, `gdfq`: a JSON document with the format's version, the card, the graph
(see `graph_json.py`), the shape and bits of each packed tensor, and a hash of these and of the
tensors.
"""

import hashlib
import json
import math
import operator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from gdfq.data.class_names import ClassNames, of_outputs
from gdfq.data.preprocessing import Preprocessing, Resize
from gdfq.data.vocabulary import Vocabulary
from gdfq.deploy.card import Card
from gdfq.deploy.graph_json import graph_from_json, graph_to_json
from gdfq.deploy.shape_check import rehearse
from gdfq.errors import UsageError
from gdfq.files.untrusted import check_shape, parse_json, safetensors_header
from gdfq.functional.float_grid import FORMATS, NumberFormat
from gdfq.functional.grid import MAX_BITS, MIN_BITS, Bits, code_bounds
from gdfq.graph import operators, queries
from gdfq.graph.inputs import IMAGES, InputSpec, takes_images
from gdfq.graph.outputs import read_structure
from gdfq.student.integer_network import IntegerNetwork
from gdfq.student.scheme import parse_placement

FORMAT, VERSION = "gdfq-student", 5
_READABLE = (4, 5)
STUDENT_FILE, EXAMPLES_FILE = "student.safetensors", "examples.npz"
"""The files of a saved network: the network, and a few images to compare exports on."""
_KEY = "gdfq"


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of `bits` bits, any shape, into uint8 [ceil(numel · bits / 8)].

    Codes are shifted to start at 0 and concatenated, least significant bit first. Those of
    floating-point grids, uint8, start at 0.
    """
    lowest = 0 if codes.dtype == torch.uint8 else code_bounds(bits)[0]
    unsigned = (codes.cpu().numpy().reshape(-1).astype(np.int16) - lowest).astype(np.uint8)
    planes = np.unpackbits(unsigned[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: list[int], form: NumberFormat | None = None) -> Tensor:
    """Unpack codes of the given shape; the inverse of `pack`.

    Args:
        packed: Bytes, uint8 [n].
        bits: Bits of a code.
        shape: Shape of the codes.
        form: The format of a floating-point grid, whose codes are uint8; those of an integer grid
            are int8.

    Raises:
        ValueError: There are more or fewer bytes than the shape needs, or codes of the format that
            are no finite numbers.
        TypeError: The shape is not one.
    """
    count = math.prod(map(operator.index, shape))
    if bits not in range(MIN_BITS, MAX_BITS + 1):
        raise ValueError(f"codes cannot have {bits} bits")
    if packed.dtype != torch.uint8 or packed.shape != (-(-count * bits // 8),):
        raise ValueError(f"{list(packed.shape)} bytes cannot hold codes {shape} of {bits} bits")
    planes = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little")
    unsigned = np.packbits(planes.reshape(count, bits), axis=1, bitorder="little")
    if form is not None:
        floats = torch.from_numpy(unsigned.reshape(shape))
        if form.bits != bits or bool(((floats & form.magnitude_bits) > form.largest_code).any()):
            raise ValueError(f"codes are not numbers of the format {form}")
        return floats
    codes = unsigned.reshape(shape).astype(np.int16) + code_bounds(bits)[0]
    return torch.from_numpy(codes.astype(np.int8))


def to_safetensors(network: IntegerNetwork, card: Card) -> bytes:
    """Return the contents of a file with an integer network and its card."""
    from safetensors.torch import save

    weights = {weight.codes_name: weight for weight in network.weights}
    packed: dict[str, Tensor] = {}
    table: dict[str, Any] = {}
    for name, tensor in network.tensors.items():
        tensor = tensor.detach().cpu()
        if name in weights:
            bits, form = weights[name].bits, weights[name].form
            table[name] = {"bits": bits, "shape": list(tensor.shape)}
            if form is not None:
                table[name]["format"] = form.name
            packed[name] = pack(tensor, bits)
        else:
            packed[name] = tensor.contiguous().clone()
    document = {
        "format": FORMAT,
        "version": VERSION,
        "card": _card_values(card),
        "codes": table,
        "graph": graph_to_json(network.graph),
    }
    document["sha256"] = digest(document, packed)
    # One key of metadata: with more, their order in the file would be random.
    return bytes(save(packed, {_KEY: json.dumps(document, separators=(",", ":"))}))


def read(path: Path) -> tuple[IntegerNetwork, Card]:
    """Read a file of `to_safetensors`.

    Raises:
        UsageError: The file cannot be read, is damaged, or is of another version.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"a quantized network is a file such as {STUDENT_FILE}; {path} cannot be read "
            f"({reason}). Give the folder of a run that has finished, or the file."
        ) from error
    return from_safetensors(data, str(path))


def from_safetensors(data: bytes, name: str = "the file") -> tuple[IntegerNetwork, Card]:
    """Return the network and card of a file's contents; `name` is for errors."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        header = parse_json(safetensors_header(data))
        document = parse_json(header["__metadata__"][_KEY])
        found, version = document["format"], document["version"]
    except (SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise _damaged(name) from error
    if found != FORMAT or version not in _READABLE:
        raise UsageError(
            f"{name} must be of format {FORMAT!r}, version {' or '.join(map(str, _READABLE))}; "
            f"it is {found!r}, version {version!r}. Read it with the version of gdfq that wrote it."
        )
    try:
        if digest(document, tensors) != document.get("sha256"):
            raise _damaged(name)
        for codes, entry in document["codes"].items():
            form = FORMATS[entry["format"]] if "format" in entry else None
            tensors[codes] = unpack(tensors[codes], entry["bits"], entry["shape"], form)
        values, graph = document["card"], document["graph"]
        card = _card(_from_version_4(values) if version == 4 else values)
    except (*_READ_ERRORS, RecursionError) as error:
        raise _damaged(name) from error
    network = IntegerNetwork(graph_from_json(graph, tensors))
    rehearse(network, card)
    if card.vocabulary is not None and card.vocabulary.size > _ids(network):
        raise _damaged(name)
    return network, card


def _ids(network: IntegerNetwork) -> float:
    """Return how many token ids the embeddings of a language model have."""
    (tokens, *_), tensors = queries.inputs(network.graph), network.tensors
    tables = [
        tensors[str(node.args[0].target)]
        for node in tokens.users
        if operators.name_of(node) == operators.EMBEDDING and isinstance(node.args[0], fx.Node)
    ]
    return min(map(len, tables), default=math.inf)


_READ_ERRORS = (LookupError, ValueError, TypeError, AttributeError, OverflowError)


def digest(document: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return the hash of a document (without its own hash) and of tensors with their names."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    hashed = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        hashed.update(tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def _card_values(card: Card) -> dict[str, Any]:
    """Return the card as plain values."""
    inputs = list(map(_input_values, card.inputs))
    values = {**asdict(card), "inputs": inputs, "bits": str(card.bits)}
    for name in ("candidates", "class_names"):  # files without them do not change
        if values[name] is None:
            del values[name]
    return values


def _input_values(spec: InputSpec) -> dict[str, Any]:
    """Return one input of a card as plain values, which `_input` reads."""
    values: dict[str, Any] = {
        "name": spec.name,
        "shape": list(spec.shape),
        "dtype": str(spec.dtype),
    }
    if spec.vocabulary is not None:
        values["vocabulary"] = asdict(spec.vocabulary)
    return values


def _from_version_4(values: dict[str, Any]) -> dict[str, Any]:
    """Convert the values of a version 4 card to the current version."""
    shape, keep, placement = (values[name] for name in ("input_shape", "keep", "placement"))
    rest = {n: value for n, value in values.items() if n not in {"input_shape", "keep"}}
    inputs = [{"name": IMAGES, "shape": shape, "dtype": str(torch.float32)}]
    placement = "relu" if placement == "t1" else placement
    return {**rest, "inputs": inputs, "layer_bits": keep, "placement": placement}


def _card(values: dict[str, Any]) -> Card:
    """Read the card of a document; raises `_READ_ERRORS` for anything that is not written here."""
    inputs = tuple(map(_input, values["inputs"]))
    if not inputs or len({spec.name for spec in inputs}) < len(inputs):
        raise ValueError("inputs must have names that differ")
    preprocessing = values["preprocessing"]
    mean, std = (tuple(map(float, preprocessing[name])) for name in ("mean", "std"))
    resize = Resize(**preprocessing.get("resize", {}))  # version 0.1.0 wrote none
    channels = inputs[0].shape[0] if takes_images(inputs) else len(mean)
    classes = None if values["classes"] is None else int(values["classes"])
    return Card(
        **{
            **values,
            "bits": Bits.parse(values["bits"]),
            "classes": classes,
            "outputs": read_structure(values["outputs"]),
            "inputs": inputs,
            "placement": parse_placement(values["placement"]),
            "candidates": None if "candidates" not in values else str(values["candidates"]),
            "class_names": _class_names(values.get("class_names"), classes),
            "layer_bits": tuple(str(pattern) for pattern in values["layer_bits"]),
            "preprocessing": Preprocessing.of(channels, mean, std, resize),
        }
    )


def _class_names(values: Any, classes: int | None) -> ClassNames | None:
    """Read the class names of a card; raises `_READ_ERRORS` for what is not written here."""
    if values is None:
        return None
    lists = isinstance(values, list) and all(isinstance(own, list) and own for own in values)
    if not lists or not all(isinstance(name, str) for own in values for name in own):
        raise TypeError("class names must be lists of names, one for each class")
    names = of_outputs(tuple(map(tuple, values)), classes)
    if names is None:
        raise ValueError(f"{len(values)} classes cannot have names where there are {classes}")
    return names


_INPUT_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float32, torch.int64, torch.int32, torch.int16, torch.int8),
        *(torch.uint8, torch.bool),
    )
}


def _input(values: dict[str, Any]) -> InputSpec:
    """Read one input of a card; raises `_READ_ERRORS` for one that no network takes."""
    shape = tuple(map(operator.index, values["shape"]))
    vocabulary = None
    if "vocabulary" in values:
        numbers = (
            (n, None if v is None else operator.index(v)) for n, v in values["vocabulary"].items()
        )
        vocabulary = Vocabulary(**dict(numbers))
    spec = InputSpec(str(values["name"]), shape, _INPUT_DTYPES[values["dtype"]], vocabulary)
    if not spec.name.isidentifier():
        raise ValueError(f"an input cannot be called {spec.name!r}")
    check_shape(shape)
    return spec


def _damaged(name: str) -> UsageError:
    return UsageError(
        f"{name} must be as gdfq wrote it; it is damaged, was changed, or is no such file. "
        "Make it again with gdfq quantize."
    )
