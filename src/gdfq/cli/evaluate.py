"""`gdfq evaluate`: accuracy on labelled images, perplexity on text, or the images of a denoiser."""

from pathlib import Path
from typing import Unpack

import click

from gdfq.api import compare_samples, load
from gdfq.errors import UsageError
from gdfq.execution.listeners import Terminal
from gdfq.plan.images import load_images
from gdfq.plan.network import resolve_network
from gdfq.plan.options import NetworkOptions
from gdfq.quantized import QuantizedNetwork


def evaluate(
    folder: Path,
    *,
    test: Path | None,
    samples: int | None,
    model: str | None,
    features: str | None,
    seed: int,
    memory: int | None,
    **options: Unpack[NetworkOptions],
) -> None:
    """Print the accuracy of the network in a folder, its perplexity, or how its images compare."""
    if (test is None) == (samples is None):
        raise UsageError(
            "evaluate measures on labelled images or on text (--test), or a denoiser on images "
            "that it generates (--samples). Give one of them."
        )
    if samples is None:
        of_samples = ("scheduler", "sampling_steps", "conditions", "input_shape")
        given = [name for name in of_samples if options.get(name) is not None]
        if given or features is not None:
            raise UsageError(
                f"{', '.join([*given, *(['features'] if features else [])])} are for --samples. "
                "Remove them, or give --samples."
            )
    if model is None and options.get("weights") is not None:
        raise UsageError("--weights are those of --model, which is missing. Give it, or neither.")
    quantized = load(folder)
    with Terminal() as terminal:
        if samples is not None:
            if model is None:
                raise UsageError(
                    "the images of a quantized denoiser are compared with those of the network "
                    "that it was made from, which the folder does not hold. Give --model, and its "
                    "options as for gdfq quantize."
                )
            compared = compare_samples(
                quantized,
                model,
                samples=samples,
                features=features,
                seed=seed,
                listener=terminal,
                memory=memory,
                **options,
            )
            found = str(compared)
        elif test is not None and model is not None:
            found = _compared(quantized, model, options.get("weights"), test, terminal)
        elif quantized.card.vocabulary is not None:
            found = f"perplexity {quantized.evaluate(test, listener=terminal):.3f}"
        else:
            accuracy = quantized.evaluate(test, listener=terminal, memory=memory)
            found = f"top-1 {accuracy:.2f} %"
    click.echo(found)


def _compared(
    quantized: QuantizedNetwork,
    model: str,
    weights: str | Path | None,
    test: Path,
    terminal: Terminal,
) -> str:
    """Return how a quantized language model compares with the original on text, in words."""
    refusal = UsageError("with --test, --model is for language models. Remove it.")
    if quantized.card.vocabulary is None:
        raise refusal
    network = resolve_network(model, weights=weights, device=str(quantized.device))
    if network.teacher.vocabulary is None:
        raise refusal
    return str(
        quantized.compare_text(network.teacher, load_images(test, network), listener=terminal)
    )
