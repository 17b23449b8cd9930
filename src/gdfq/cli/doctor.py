"""`gdfq doctor`: a diagnosis as a table for people or as JSON for programs."""

import json
from typing import Unpack

import click
import torch
from rich.console import Console
from rich.table import Table

from gdfq.analysis.bit_allocation import AUTO, parse_bits
from gdfq.analysis.cost import with_costs
from gdfq.analysis.preflight import Diagnosis, Layer, diagnose
from gdfq.cli.network import NetworkOptions, open_network
from gdfq.errors import UsageError
from gdfq.execution.precision import find_device
from gdfq.graph.capture import capture
from gdfq.recipes import find_recipe
from gdfq.student.scheme import LayerBits, Scheme, parse_placement


def doctor(
    *,
    bits: str,
    recipe: str,
    placement: str | None,
    keep: tuple[str, ...],
    steps: int | None,
    device: str,
    classifier: bool | None,
    as_json: bool,
    **options: Unpack[NetworkOptions],
) -> int:
    """Print the diagnosis; 0 when the run would go, 1 when it would end at once."""
    if bits == AUTO:
        raise UsageError(
            "doctor looks at widths that are given; leave --bits auto to gdfq quantize."
        )
    chosen = find_recipe(recipe).with_steps(steps)
    keeps = tuple(map(LayerBits.parse, keep))
    scheme = Scheme(parse_bits(bits, None), parse_placement(placement or chosen.placement), keeps)
    network, shape, _ = open_network(warns=False, **options)
    teacher = capture(network, torch.zeros(1, *shape), classifier=classifier)
    teacher = teacher.to(find_device(device))
    diagnosis = with_costs(diagnose(teacher, scheme, chosen), teacher, scheme, chosen)
    if as_json:
        click.echo(json.dumps(diagnosis.as_values(), indent=1))
    else:
        _print(diagnosis)
    return 1 if diagnosis.problems else 0


def _print(diagnosis: Diagnosis) -> None:
    for text in diagnosis.problems:
        click.secho(f"{'problem':12}{text}", fg="red")
    if diagnosis.problems:
        return
    console = Console()
    table = Table("layer", "operator", "weight", "Mops", "bits", "input bits")
    for layer in diagnosis.layers:
        table.add_row(*_cells(layer))
    console.print(table)
    for name, text in _facts(diagnosis).items():
        click.echo(f"{name:12}{text}")
    for text in diagnosis.advice:
        click.echo(f"{'expect':12}{text}")


def _cells(layer: Layer) -> tuple[str, ...]:
    return (
        layer.name,
        layer.operator,
        "x".join(map(str, layer.weight)),
        f"{layer.operations / 1e6:.2f}",
        "float (kept)" if layer.bits is None else str(layer.bits),
        "float" if layer.input_bits is None else str(layer.input_bits),
    )


def _in_float(diagnosis: Diagnosis) -> str:
    """Operators by the reason for which they stay float."""
    reasons: dict[str, list[str]] = {}
    for found in diagnosis.float_operators:
        reasons.setdefault(found.why, []).append(f"{found.count} {found.operator}")
    return "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())


def _facts(diagnosis: Diagnosis) -> dict[str, str]:
    shape = "x".join(map(str, diagnosis.input_shape))
    outputs = ", ".join(diagnosis.outputs)
    task = (
        f"{outputs}, matched as they are (they are not classes)"
        if diagnosis.classes is None
        else f"{outputs} of {diagnosis.classes} classes"
    )
    facts = {
        "input": shape,
        "output": task,
        "recipe": f"{diagnosis.recipe}, {diagnosis.bits}, placement {diagnosis.placement}",
        "network": diagnosis.summary(),
        "in float": _in_float(diagnosis) or "no operator",
    }
    if diagnosis.seconds is not None and diagnosis.peak_bytes is not None:
        parts = ", ".join(f"{name} {value:.0f} s" for name, value in diagnosis.seconds.items())
        facts["time"] = f"about {parts} on this device, measured on one step of each"
        facts["memory"] = f"about {diagnosis.peak_bytes / 2**30:.1f} GiB at most"
    return facts
