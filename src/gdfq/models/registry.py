"""Loading networks: from a library, from a factory in a file or package, from a program."""

from dataclasses import replace
from pathlib import Path

import torch

from gdfq.errors import UsageError
from gdfq.graph.wrappers import unwrapped
from gdfq.models.code import from_factory, from_program
from gdfq.models.file_kinds import foreign_kind, holds_weights
from gdfq.models.hubs import HUBS, from_hub
from gdfq.models.loaded import Loaded, names_of
from gdfq.models.weights import load_weights_, weights_hash

__all__ = ["RANDOM", "Loaded", "load_model", "load_weights_", "weights_hash"]

RANDOM = "random"
"""Instead of a weights file: a library's network with its initial weights, always the same."""


def load_model(spec: str, weights: str | Path | None = None) -> Loaded:
    """Load a network by its name.

    Args:
        spec: `timm:NAME`, `torchvision:NAME`, `hf:ID`, `ptcv:NAME` or `diffusers:ID`, with
            pretrained weights from that library; or `path/to/file.py:factory`,
            `package.module:factory` or a `.pt2` file that `torch.export.save` wrote. Loading one of
            the last three can run its code.
        weights: A safetensors file or a torch checkpoint (read with weights_only), as
            `gdfq.models.weights.load_weights_` reads it. `random` leaves the weights of a
            library's network untrained. In both cases the library downloads no weights.

    Raises:
        UsageError: The network or its weights are missing, or do not match.
    """
    hub, colon, name = spec.partition(":")
    untrained = str(weights) == RANDOM
    if colon and hub in HUBS:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            loaded = from_hub(hub, name, pretrained=weights is None)
        if loaded.vocabulary is not None and not (weights is None or untrained):
            raise UsageError(
                "the weights of a language model lie in its folder, beside its configuration; "
                f"--weights {weights} was given, too. Save it there (save_pretrained) and give the "
                "folder as hf:FOLDER without --weights."
            )
    elif untrained:
        raise UsageError(
            f"--weights {RANDOM} is for networks of a library ({', '.join(HUBS)}); {spec} comes "
            "with the weights that its code gives it. Remove --weights, or give a file."
        )
    elif spec.endswith(".pt2"):
        loaded = from_program(Path(spec))
    elif spec.endswith(".onnx"):
        raise UsageError(
            "MODEL must be a PyTorch network; ONNX files cannot be read: their exporters fold the "
            "batch norms away whose statistics gdfq needs, and no converter back is reliable. "
            f"Give the network that {spec} was exported from, as file.py:factory or a .pt2 file."
        )
    elif kind := foreign_kind(Path(spec)):
        raise UsageError(
            f"MODEL must be the code of a network; {spec} is {kind}. Give the network that it was "
            "made from, as file.py:factory or a library's name."
        )
    elif holds_weights(Path(spec)):
        raise UsageError(
            f"MODEL must be the code of a network; {spec} holds weights alone. Give the network as "
            f"file.py:factory or a library's name, with --weights {spec}."
        )
    else:
        loaded = Loaded(from_factory(spec))
    loaded = replace(loaded, module=unwrapped(loaded.module))
    own = names_of(loaded.module)
    if weights is None or untrained:
        return replace(loaded, class_names=loaded.class_names or own)
    note = load_weights_(loaded.module, Path(weights))
    # Other weights may be for other classes; only a configuration belongs to the network.
    return replace(loaded, class_names=own, notes=(note,))
