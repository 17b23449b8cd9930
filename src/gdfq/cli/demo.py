"""`gdfq demo`: the main job on a network that is trained here and then loses its data."""

from pathlib import Path

import click
import torch

from gdfq import demo as digits
from gdfq.cli.quantize import Outputs, config_of, quantize_into, report_after
from gdfq.execution.context import Context
from gdfq.execution.listeners import Terminal
from gdfq.pipeline import run
from gdfq.plan.method import resolve_method
from gdfq.plan.network import resolve_network
from gdfq.plan.resolve import plan_of
from gdfq.recipes import FAST
from gdfq.runs.folder import RunFolder

_BITS = "w4a4"


def demo(out: Path) -> None:
    """Train, drop the data, quantize by three recipes, and compare."""
    folder = RunFolder(out)
    training, held_out = digits.load_digits()
    test = (held_out.images, held_out.labels)
    click.echo(f"training a small network on {len(training.labels)} handwritten digits ...")
    trained = digits.train(training)
    del training
    click.echo("the training digits are gone; quantizing to W4A4 from the network alone ...")
    network = resolve_network(
        trained,
        torch.zeros(1, *digits.INPUT_SHAPE),
        mean=digits.PREPROCESSING.mean,
        std=digits.PREPROCESSING.std,
    )
    recipes = {"fast": FAST, "GDFQ (paper)": digits.RECIPE, "direct rounding": digits.ROUNDING}
    plans = {
        name: plan_of(network, resolve_method(_BITS, recipe, placement=FAST.placement), test=test)
        for name, recipe in recipes.items()
    }
    plan, context = plans.pop("fast"), Context()
    fast = quantize_into(folder, config_of(plan, context), plan, context, Outputs())
    results = {"fast": fast}
    for name, plan in plans.items():
        with Terminal() as terminal:
            results[name] = run(plan, Context(listener=terminal))
    rows = [
        (name, result.metrics["student"]["top1"], result.metrics["seconds"]["total"])
        for name, result in reversed(results.items())
    ]
    rows.insert(0, ("full precision", fast.metrics["teacher"]["top1"], 0.0))
    click.echo(f"\n{'':18}{'top-1':>8}{'seconds':>10}   on {len(held_out.labels)} digits")
    for name, accuracy, seconds in rows:
        click.echo(f"{name:18}{accuracy:7.2f}%{seconds:10.0f}")
    click.echo(f"\nthe run is in {out}; load it with gdfq.load({str(out)!r})")
    report_after(out)
