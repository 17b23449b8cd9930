"""The saved student: codes packed at their true width (safetensors), the graph as JSON.

`student.json` holds the format's version, the card, the graph, and the hash of
`student.safetensors`. It is written last, and a reader needs both files to agree: what was only
half written does not load.
"""

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from gdfq import operators
from gdfq.artifacts.graphs import graph_from_json, graph_to_json
from gdfq.capture import tensors_of
from gdfq.card import Card
from gdfq.data import Preprocessing
from gdfq.errors import UsageError
from gdfq.files import write_atomically
from gdfq.grid import Bits, code_bounds

FORMAT, VERSION = "gdfq-student", 1
GRAPH_FILE, TENSOR_FILE = "student.json", "student.safetensors"


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

    Raises ValueError when there are more or fewer bytes than the shape needs.
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (-(-count * bits // 8),):
        raise ValueError(f"{list(packed.shape)} bytes cannot hold codes {shape} of {bits} bits")
    planes = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little")
    unsigned = np.packbits(planes.reshape(count, bits), axis=1, bitorder="little")
    codes = unsigned.reshape(shape).astype(np.int16) + code_bounds(bits)[0]
    return torch.from_numpy(codes.astype(np.int8))


def save(network: fx.GraphModule, card: Card, folder: Path) -> None:
    """Write a frozen network and its card into the folder, which is made if needed."""
    from safetensors.torch import save as to_safetensors

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
    # One key of metadata: with more, safetensors' order, and so the hash, is a matter of chance.
    data = to_safetensors(packed, {"schema": f"{FORMAT}/{VERSION}"})
    document = {
        "format": FORMAT,
        "version": VERSION,
        "card": {**asdict(card), "bits": str(card.bits)},
        "sha256": hashlib.sha256(data).hexdigest(),
        "codes": table,
        "graph": graph_to_json(network.graph),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / GRAPH_FILE).unlink(missing_ok=True)
    write_atomically(folder / TENSOR_FILE, data)
    write_atomically(folder / GRAPH_FILE, (json.dumps(document, indent=1) + "\n").encode())


def read(folder: Path) -> tuple[fx.GraphModule, Card]:
    """Read what `save` wrote. Raises UsageError as `gdfq.load` says."""
    from safetensors import SafetensorError
    from safetensors.torch import load as from_safetensors

    try:
        text = (folder / GRAPH_FILE).read_bytes()
        data = (folder / TENSOR_FILE).read_bytes()
    except OSError as error:
        raise UsageError(
            f"a finished run holds {GRAPH_FILE} and {TENSOR_FILE}; in {folder} one cannot be "
            f"read ({error.strerror}). Give the folder of a run that has finished."
        ) from error
    try:
        document = json.loads(text)
        found, version = document["format"], document["version"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _damaged(folder, GRAPH_FILE) from error
    if found != FORMAT or version != VERSION:
        raise UsageError(
            f"{folder / GRAPH_FILE} must be of format {FORMAT!r}, version {VERSION}; it is "
            f"{found!r}, version {version!r}. Read it with the version of gdfq that wrote it."
        )
    if hashlib.sha256(data).hexdigest() != document.get("sha256"):
        raise _damaged(folder, TENSOR_FILE)
    try:
        tensors = from_safetensors(data)
        for name, entry in document["codes"].items():
            tensors[name] = unpack(tensors[name], entry["bits"], entry["shape"])
        card = _card(document["card"])
        graph = document["graph"]
    except (SafetensorError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(folder, GRAPH_FILE) from error
    return graph_from_json(graph, tensors), card


def _code_widths(network: fx.GraphModule) -> dict[str, int]:
    """The bits of each tensor of codes, from the operators that read it."""
    dequantize = operators.resolve("gdfq.dequantize")
    nodes = network.graph.find_nodes(op="call_function", target=dequantize)
    return {str(node.args[0].target): node.args[3] for node in nodes}


def _card(values: dict[str, Any]) -> Card:
    """The card of a document. Raises ValueError and others for what `save` does not write."""
    shape = tuple(int(size) for size in values["input_shape"])
    preprocessing = values["preprocessing"]
    return Card(
        **{
            **values,
            "bits": Bits.parse(values["bits"]),
            "classes": int(values["classes"]),
            "input_shape": shape,
            "preprocessing": Preprocessing.of(
                shape[0], preprocessing["mean"], preprocessing["std"]
            ),
        }
    )


def _damaged(folder: Path, file: str) -> UsageError:
    return UsageError(
        f"{folder / file} must be as gdfq wrote it; it is damaged or was changed. "
        "Make it again with gdfq quantize."
    )
