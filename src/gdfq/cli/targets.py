"""`gdfq targets`: where a quantized network can run."""

from collections.abc import Mapping

import click

from gdfq.deploy.export import OTHER_NAMES, TARGETS
from gdfq.deploy.target import Runtime, Target
from gdfq.student.scheme import OF_IMAGES


def targets() -> None:
    """Print each target: its file, its runtime, what must be installed, what is proven."""
    width = max(map(len, TARGETS)) + 2
    for target in TARGETS.values():
        click.echo(f"{target.name:{width}}{target.summary}")
        print_facts(facts(target), width)


def print_facts(found: Mapping[str, str], width: int) -> None:
    """Print the facts of a target, a line each, behind a margin of this width."""
    for title, text in found.items():
        click.echo(f"{'':{width}}{title:13}{text}")


def facts(target: Target) -> dict[str, str]:
    """Return what there is to know of a target, as lines for people."""
    found = {"file": target.file_name}
    if others := [other for other, name in OTHER_NAMES.items() if name == target.name]:
        found["also"] = ", ".join(others)
    if target.made_for:
        found["made for"] = f"{target.made_for}; {target.unproven}"
    if target.runtime is not None:
        found["runs in"] = _versions(target.runtime)
        found["install"] = _installation(target.runtime)
    found["weights"] = target.weights.in_words()
    found["activations"] = target.activations.in_words()
    if effects := _effects(target):
        found["changes"] = effects
    if not set(OF_IMAGES) <= set(target.placements):
        found["placement"] = " or ".join(target.placements)
    if set(OF_IMAGES) & set(target.placements):
        found["images"] = target.layout.upper()
    found["equal"] = target.equality
    return found


def _effects(target: Target) -> str:
    """Return what becomes of a network's grids for the sake of the target, beside their bits."""
    rules = target.grids
    effects = []
    if rules.symmetric_activations:
        effects.append("activations behind a ReLU have half of the codes, 128 of 256")
    if rules.symmetric_weights:
        effects.append("weights of fewer than 8 bits are symmetric")
    if rules.one_grid_for_joins:
        effects.append("the inputs of a concatenation and its result share one grid")
    return "; ".join(effects)


def _installation(runtime: Runtime) -> str:
    """Return what installs a runtime, and whether it is installed."""
    if not runtime.extra:
        return "installed with gdfq"
    return f"{runtime.installation}{' (it is installed)' if runtime.is_installed else ''}"


def _versions(runtime: Runtime) -> str:
    """Return name and oldest versions: `ONNX Runtime 1.21 or newer (1.23 below 5 bits)`."""
    if not runtime.oldest:
        return runtime.name
    *newer, (_, usual) = runtime.oldest
    bounds = [bits for bits, _ in runtime.oldest[1:]]
    exceptions = [
        f"{version} for weights below {bound} bits"
        for (_, version), bound in zip(newer, bounds, strict=True)
    ]
    more = f" ({', '.join(reversed(exceptions))})" if exceptions else ""
    return f"{runtime.name} {usual} or newer{more}"
