"""The network that a command line names."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, Unpack

import click
from torch import nn

from gdfq.data.preprocessing import Preprocessing
from gdfq.models.registry import load_model


class NetworkOptions(TypedDict):
    """The options of every command that reads a network; `gdfq.cli.app` says what each is."""

    model: str
    weights: Path | None
    input_shape: tuple[int, ...] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None


def open_network(
    *, warns: bool, **options: Unpack[NetworkOptions]
) -> tuple[nn.Module, tuple[int, ...], Preprocessing]:
    """The network, the shape of one input [C, *], and its preprocessing.

    warns: whether to say on standard error what is assumed of a normalisation that nobody knows.
    Raises UsageError as `gdfq.models.registry.load_model` and `Loaded.input` do.
    """
    mean, std = options["mean"], options["std"]
    loaded = load_model(options["model"], options["weights"])
    shape, preprocessing = loaded.input(options["input_shape"], mean, std)
    if warns and loaded.preprocessing is None:
        _warn_about_normalisation(mean, std)
    return loaded.module, shape, preprocessing


def _warn_about_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
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
