"""What is told of an input that may be meant otherwise."""

from collections.abc import Sequence

import click


def warn_about_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    missing = " and ".join(
        f"--{name}" for name, value in (("mean", mean), ("std", std)) if value is None
    )
    if missing:
        click.secho(
            f"warning: no {missing} given, so mean 0 and std 1 are used: the network is taken to "
            "expect pixels in 0..1. If it was trained on normalised images, the result will be "
            "poor: give their mean and std.",
            fg="yellow",
            err=True,
        )
