"""`gdfq doctor`: a diagnosis as a table for people or as JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Unpack

import click
from rich.console import Console
from rich.table import Table

from gdfq.analysis.bit_allocation import AUTO
from gdfq.analysis.cost import with_costs
from gdfq.analysis.preflight import Diagnosis, Layer, diagnose
from gdfq.analysis.run_costs import Following
from gdfq.cli.console import budget_in_words
from gdfq.cli.targets import facts, print_facts
from gdfq.deploy.export import named_target
from gdfq.deploy.target import Target
from gdfq.errors import UsageError
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.context import Context
from gdfq.plan.options import PlanOptions
from gdfq.plan.plan import Plan, Timing
from gdfq.plan.resolve import resolve


def doctor(
    *,
    model: str,
    bits: str | None,
    recipe: str,
    as_json: bool,
    memory: int | None,
    **options: Unpack[PlanOptions],
) -> int:
    """Print the diagnosis.

    Returns:
        Exit code: 0, or 1 if the run could not start.
    """
    if bits == AUTO:
        raise UsageError(
            "doctor needs the bits; --bits auto chooses them during the run. Give them, as w4a4."
        )
    said = options.get("target")
    target = None if said is None else named_target(said)
    if target is not None:  # what it makes of the network is said without its runtime, too
        options["target"] = replace(target, runtime=None)
    budget = MemoryBudget.of(memory)
    plan = resolve(
        model,
        None,
        bits,
        recipe,
        context=Context(memory=budget),
        timing=Timing(following=Following(export=True, report=True)),
        **options,
    )
    diagnosis = diagnose(plan.teacher, plan.scheme, plan.carried_out)
    diagnosis = with_costs(diagnosis, plan.teacher, plan.scheme, plan.carried_out, budget)
    inputs, absence = _inputs(plan), _absence(target)
    if as_json:
        values = {**diagnosis.as_values(), **inputs}
        values["problems"] = [*diagnosis.problems, *absence]
        if target is not None:
            values["target"] = {"name": target.name, **facts(target)}
        click.echo(json.dumps(values, indent=1))
    else:
        _print(diagnosis, inputs, target)
        _print_problems(absence)
    return 1 if diagnosis.problems or absence else 0


def _absence(target: Target | None) -> list[str]:
    """Return why a run for the target could not start on this machine."""
    if target is None or target.runtime is None or target.runtime.is_installed:
        return []
    return [target.runtime.absence]


def _inputs(plan: Plan) -> dict[str, str]:
    """What a run would read: weights, normalisation, images and how their labels are known."""
    mean, std = (", ".join(map(str, v)) for v in (plan.preprocessing.mean, plan.preprocessing.std))
    found = {"weights": "; ".join(plan.notes)} if plan.notes else {}
    if plan.budget is not None:
        found["budget"] = budget_in_words(plan).removeprefix(", ")
    if plan.sampler is not None:
        found["sampler"] = str(plan.sampler)
    elif plan.teacher.vocabulary is None:
        found["pixels"] = f"(pixel / 255 - mean) / std, mean {mean}, std {std}"
    what = "images" if plan.teacher.vocabulary is None else "sequences"
    proxy = None if plan.candidates is None else plan.candidates.data
    for name, images in (("data", plan.given), ("proxy", proxy), ("test", plan.test)):
        if images is not None:
            rule = getattr(images, "rule", "")
            found[name] = f"{len(images)} {what}" + (f"; {rule}" if rule else "")
    return found


def _print_problems(problems: Sequence[str]) -> None:
    for text in problems:
        click.secho(f"{'problem':12}{text}", fg="red")


def _print(diagnosis: Diagnosis, inputs: Mapping[str, str], target: Target | None) -> None:
    _print_problems(diagnosis.problems)
    if diagnosis.problems:
        return
    console = Console()
    table = Table("layer", "operator", "weight", "Mops", "bits", "input bits")
    for layer in diagnosis.layers:
        table.add_row(*_cells(layer))
    console.print(table)
    for name, text in {**_facts(diagnosis), **inputs}.items():
        click.echo(f"{name:12}{text}")
    if target is not None:
        click.echo(f"{'target':12}{target.name}: the network fits")
        print_facts(facts(target), 12)
    for text in diagnosis.advice:
        click.echo(f"{'expect':12}{text}")


def _cells(layer: Layer) -> tuple[str, ...]:
    return (
        layer.name,
        layer.operator,
        "x".join(map(str, layer.weight)),
        f"{layer.operations / 1e6:.2f}",
        "float" if layer.bits is None else str(layer.bits),
        "float" if layer.input_bits is None else str(layer.input_bits),
    )


def _in_float(diagnosis: Diagnosis) -> str:
    """Return the operators that stay in float, grouped by reason."""
    reasons: dict[str, list[str]] = {}
    for found in diagnosis.float_operators:
        reasons.setdefault(found.why, []).append(f"{found.count} {found.operator}")
    return "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())


def _facts(diagnosis: Diagnosis) -> dict[str, str]:
    facts = {
        "input": diagnosis.inputs,
        "output": diagnosis.task,
        "recipe": f"{diagnosis.recipe}, {diagnosis.bits}, placement {diagnosis.placement}: "
        f"{diagnosis.effort}",
        "network": diagnosis.summary(),
        "in float": _in_float(diagnosis) or "no operator",
    }
    if diagnosis.seconds is not None:
        parts = ", ".join(f"{name} {value:.0f} s" for name, value in diagnosis.seconds.items())
        facts["time"] = f"about {parts} on this device, measured on one step of each"
    if diagnosis.peak_bytes is not None:
        facts["memory"] = f"about {diagnosis.peak_bytes / 2**30:.1f} GiB at most"
    return facts
