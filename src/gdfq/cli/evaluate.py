"""`gdfq evaluate`: top-1 accuracy on labelled images."""

from pathlib import Path

import click

from gdfq.api import load
from gdfq.execution.listeners import Terminal


def evaluate(folder: Path, test: Path, memory: int | None) -> None:
    """Print the accuracy of the quantized network in a folder."""
    with Terminal() as terminal:
        accuracy = load(folder).evaluate(test, listener=terminal, memory=memory)
    click.echo(f"top-1 {accuracy:.2f} %")
