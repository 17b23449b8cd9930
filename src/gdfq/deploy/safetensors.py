"""The saved student: one safetensors file, codes packed at their true width.

Its metadata has one entry, `gdfq`: a JSON document with the format's version, the card, the graph
(see `graphs.py`), the shape and width of each packed tensor, and a hash of all that and of the
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

from gdfq.data.preprocessing import Preprocessing, Resize
from gdfq.deploy.card import Card
from gdfq.deploy.graph_json import graph_from_json, graph_to_json
from gdfq.deploy.shape_check import rehearse
from gdfq.errors import UsageError
from gdfq.files.untrusted import check_shape, parse_json
from gdfq.functional.grid import MAX_BITS, MIN_BITS, Bits, code_bounds
from gdfq.graph import operators
from gdfq.graph.outputs import read_structure
from gdfq.graph.tensors import tensors_of

FORMAT, VERSION = "gdfq-student", 4
STUDENT_FILE = "student.safetensors"
_KEY = "gdfq"
_HEADER = 8
"""Bytes in which a safetensors file says how long its header is."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed codes of `bits` bits, any shape -> uint8 [ceil(numel · bits / 8)].

    Codes are shifted to start at 0 and laid one after another, least significant bit first.
    """
    unsigned = (codes.cpu().numpy().reshape(-1).astype(np.int16) - code_bounds(bits)[0]).astype(
        np.uint8
    )
    planes = np.unpackbits(unsigned[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: list[int]) -> Tensor:
    """The inverse of `pack`: int8 codes of the given shape.

    Raises ValueError when there are more or fewer bytes than the shape needs, and TypeError when
    that is no shape.
    """
    count = math.prod(map(operator.index, shape))
    if bits not in range(MIN_BITS, MAX_BITS + 1):
        raise ValueError(f"codes cannot have {bits} bits")
    if packed.dtype != torch.uint8 or packed.shape != (-(-count * bits // 8),):
        raise ValueError(f"{list(packed.shape)} bytes cannot hold codes {shape} of {bits} bits")
    planes = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little")
    unsigned = np.packbits(planes.reshape(count, bits), axis=1, bitorder="little")
    codes = unsigned.reshape(shape).astype(np.int16) + code_bounds(bits)[0]
    return torch.from_numpy(codes.astype(np.int8))


def to_safetensors(network: fx.GraphModule, card: Card) -> bytes:
    """A frozen network and its card as the contents of a file."""
    from safetensors.torch import save

    widths = _code_widths(network)
    packed: dict[str, Tensor] = {}
    table: dict[str, Any] = {}
    for name, tensor in tensors_of(network).items():
        tensor = tensor.detach().cpu()
        if name in widths:
            table[name] = {"bits": widths[name], "shape": list(tensor.shape)}
            packed[name] = pack(tensor, widths[name])
        else:
            packed[name] = tensor.contiguous().clone()
    document = {
        "format": FORMAT,
        "version": VERSION,
        "card": {**asdict(card), "bits": str(card.bits)},
        "codes": table,
        "graph": graph_to_json(network.graph),
    }
    document["sha256"] = digest(document, packed)
    # One key of metadata: with more, safetensors' order, and so the file, is a matter of chance.
    return bytes(save(packed, {_KEY: json.dumps(document, separators=(",", ":"))}))


def header_bytes(data: bytes) -> int:
    """How much of a safetensors file is not tensors."""
    return _HEADER + int.from_bytes(data[:_HEADER], "little")


def read(path: Path) -> tuple[fx.GraphModule, Card]:
    """Read what `to_safetensors` made. Raises UsageError as `gdfq.load` says."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"a quantized network is a file such as {STUDENT_FILE}; {path} cannot be read "
            f"({reason}). Give the folder of a run that has finished, or the file."
        ) from error
    return from_safetensors(data, str(path))


def from_safetensors(data: bytes, name: str = "the file") -> tuple[fx.GraphModule, Card]:
    """The network and card of a file's contents; `name` is for errors."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        header = parse_json(data[_HEADER : header_bytes(data)])
        document = parse_json(header["__metadata__"][_KEY])
        found, version = document["format"], document["version"]
    except (SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise _damaged(name) from error
    if found != FORMAT or version != VERSION:
        raise UsageError(
            f"{name} must be of format {FORMAT!r}, version {VERSION}; it is "
            f"{found!r}, version {version!r}. Read it with the version of gdfq that wrote it."
        )
    try:
        if digest(document, tensors) != document.get("sha256"):
            raise _damaged(name)
        for codes, entry in document["codes"].items():
            tensors[codes] = unpack(tensors[codes], entry["bits"], entry["shape"])
        card, graph = _card(document["card"]), document["graph"]
    except (*_NOT_OURS, RecursionError) as error:
        raise _damaged(name) from error
    network = graph_from_json(graph, tensors)
    rehearse(network, card)
    return network, card


_NOT_OURS = (LookupError, ValueError, TypeError, AttributeError, OverflowError)


def digest(document: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """The hash of a document, but for the one that it holds, and of tensors and their names."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    hashed = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        hashed.update(tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def _code_widths(network: fx.GraphModule) -> dict[str, int]:
    """The bits of each tensor of codes, from the operators that read it."""
    dequantize = operators.resolve("gdfq.dequantize")
    nodes = network.graph.find_nodes(op="call_function", target=dequantize)
    return {str(node.args[0].target): node.args[3] for node in nodes}


def _card(values: dict[str, Any]) -> Card:
    """The card of a document. Raises ValueError and others for what `save` does not write."""
    shape = tuple(map(operator.index, values["input_shape"]))
    check_shape(shape)
    preprocessing = values["preprocessing"]
    return Card(
        **{
            **values,
            "bits": Bits.parse(values["bits"]),
            "classes": None if values["classes"] is None else int(values["classes"]),
            "outputs": read_structure(values["outputs"]),
            "input_shape": shape,
            "keep": tuple(str(pattern) for pattern in values["keep"]),
            "preprocessing": Preprocessing.of(
                shape[0],
                tuple(map(float, preprocessing["mean"])),
                tuple(map(float, preprocessing["std"])),
                Resize(**preprocessing.get("resize", {})),  # version 0.1.0 wrote none
            ),
        }
    )


def _damaged(name: str) -> UsageError:
    return UsageError(
        f"{name} must be as gdfq wrote it; it is damaged, was changed, or is no such file. "
        "Make it again with gdfq quantize."
    )
