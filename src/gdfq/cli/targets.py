"""`gdfq targets`: where a quantized network can run."""

import click

from gdfq.deploy.export import OTHER_NAMES, TARGETS
from gdfq.deploy.target import Runtime, Target


def targets() -> None:
    """Print each target: its file, its runtime, what must be installed, what is proven."""
    for target in TARGETS.values():
        click.echo(f"{target.name:14}{target.summary}")
        for title, text in facts(target).items():
            click.echo(f"{'':14}{title:13}{text}")


def facts(target: Target) -> dict[str, str]:
    """Return what there is to know of a target, as lines for people."""
    found = {"file": target.file_name}
    if others := [other for other, name in OTHER_NAMES.items() if name == target.name]:
        found["also"] = ", ".join(others)
    if target.made_for:
        found["made for"] = f"{target.made_for}; {target.unproven}"
    if target.runtime is not None:
        found["runs in"] = _versions(target.runtime)
        comes_along = not target.runtime.extra
        found["install"] = "installed with gdfq" if comes_along else target.runtime.installation
    found["weights"] = target.weights.in_words()
    found["activations"] = target.activations.in_words()
    found["images"] = target.layout.upper()
    found["equal"] = target.equality
    return found


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
