"""The main job on a network that is trained here and then loses its data."""

from pathlib import Path
from typing import Any

import click
import torch

from gdfq import demo as digits
from gdfq.cli.quantize import quantize_into, report_at_once, written_down
from gdfq.execution.listeners import Terminal
from gdfq.files.plain_values import as_values
from gdfq.graph.capture import capture
from gdfq.pipeline import quantize
from gdfq.recipes import FAST
from gdfq.runs.folder import RunFolder


def demo(out: Path) -> None:
    """`gdfq demo`."""
    folder = RunFolder(out)
    training, held_out = digits.load_digits()
    test = (held_out.images, held_out.labels)
    click.echo(f"training a small network on {len(training.labels)} handwritten digits ...")
    network = digits.train(training)
    del training
    click.echo("the training digits are gone; quantizing to W4A4 from the network alone ...")
    example = torch.zeros(1, *digits.INPUT_SHAPE)
    common: dict[str, Any] = {
        "bits": "w4a4",
        "placement": FAST.placement,
        "test": test,
        "mean": digits.PREPROCESSING.mean,
        "std": digits.PREPROCESSING.std,
    }
    config = written_down(network, "auto") | {
        "bits": "w4a4",
        "recipe": as_values(FAST),
        "seed": 0,
    }
    teacher = capture(network, example)
    fast = quantize_into(
        folder, config, teacher, example, recipe=FAST, onnx=True, report=True, **common
    )
    results = {"fast": fast}
    for name, recipe in (("GDFQ (paper)", digits.RECIPE), ("direct rounding", digits.ROUNDING)):
        with Terminal() as terminal:
            results[name] = quantize(teacher, example, recipe=recipe, listener=terminal, **common)
    rows = [
        (name, result.metrics["student"]["top1"], result.metrics["seconds"]["total"])
        for name, result in reversed(results.items())
    ]
    rows.insert(0, ("full precision", fast.metrics["teacher"]["top1"], 0.0))
    click.echo(f"\n{'':18}{'top-1':>8}{'seconds':>10}   on {len(held_out.labels)} digits")
    for name, accuracy, seconds in rows:
        click.echo(f"{name:18}{accuracy:7.2f}%{seconds:10.0f}")
    click.echo(f"\nthe run is in {out}; load it with gdfq.load({str(out)!r})")
    report_at_once(out)
