"""The metadata of an exported file."""

from collections.abc import Mapping, Sequence

from gdfq.deploy.card import Card
from gdfq.deploy.onnx.session import PRECISE
from gdfq.graph.inputs import takes_images

_LOADS_ALL = "1.24"
"""Oldest version of ONNX Runtime that loads files of all bits."""


def metadata_of(
    card: Card, accuracy: Mapping[str, float], *, safe: bool, oldest: str = _LOADS_ALL
) -> dict[str, str]:
    """Return the metadata of an ONNX file.

    Args:
        card: The card of the network.
        accuracy: Top-1 in percent, by name.
        safe: Whether no 16-bit sum can overflow on x86 processors without VNNI.
        oldest: Oldest version of ONNX Runtime that loads the file; by default one that loads any.
    """
    return {
        **facts_of(card, accuracy),
        "onnxruntime": f">={oldest}",
        "x86_without_vnni": (
            "safe" if safe else f"may saturate: set {'='.join(PRECISE)}, or export with --safe-x86"
        ),
    }


def facts_of(card: Card, accuracy: Mapping[str, float]) -> dict[str, str]:
    """Return the metadata of a file of any runtime.

    Args:
        card: The card of the network.
        accuracy: Top-1 in percent, by name.
    """
    return {
        "gdfq": card.gdfq_version,
        "bits": str(card.bits),
        "placement": card.placement,
        "layer_bits": " ".join(card.layer_bits),
        "recipe": card.recipe,
        "seed": str(card.seed),
        **({} if card.classes is None else {"classes": str(card.classes)}),
        **({} if card.candidates is None else {"candidates": card.candidates}),
        **_input_values(card),
        **{f"top1_{name}": f"{value:.4f}" for name, value in accuracy.items()},
    }


def _input_values(card: Card) -> dict[str, str]:
    """Return the description of images and their normalisation, or of several inputs."""
    if not takes_images(card.inputs):
        return {"inputs": ", ".join(map(str, card.inputs))}
    return {
        "input_shape": "x".join(map(str, card.input_shape)),
        "mean": _numbers(card.preprocessing.mean),
        "std": _numbers(card.preprocessing.std),
    }


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:.9g}" for value in values)
