"""`gdfq evaluate`: top-1 accuracy on labelled images, or the perplexity of a language model."""

from pathlib import Path

import click

from gdfq.api import load
from gdfq.errors import UsageError
from gdfq.execution.listeners import Terminal
from gdfq.plan.images import load_images
from gdfq.plan.network import resolve_network
from gdfq.quantized import QuantizedNetwork


def evaluate(folder: Path, test: Path, model: str | None, memory: int | None) -> None:
    """Print the accuracy of the quantized network in a folder, or its perplexity.

    Args:
        folder: The folder of the network.
        test: Images with labels, or text.
        model: The original of a language model, to compare with.
        memory: Bytes of activations.
    """
    quantized = load(folder)
    with Terminal() as terminal:
        if model is not None:
            found = _compared(quantized, model, test, terminal)
        elif quantized.card.vocabulary is not None:
            found = f"perplexity {quantized.evaluate(test, listener=terminal):.3f}"
        else:
            accuracy = quantized.evaluate(test, listener=terminal, memory=memory)
            found = f"top-1 {accuracy:.2f} %"
    click.echo(found)


def _compared(quantized: QuantizedNetwork, model: str, test: Path, terminal: Terminal) -> str:
    """Return how a quantized language model compares with the original, in words."""
    network = resolve_network(model, device=str(quantized.device))
    if quantized.card.vocabulary is None or network.teacher.vocabulary is None:
        raise UsageError("--model is for language models. Remove it.")
    return str(
        quantized.compare_text(network.teacher, load_images(test, network), listener=terminal)
    )
