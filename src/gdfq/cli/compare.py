"""`gdfq compare`: several runs side by side, as a page and as a table."""

from collections.abc import Sequence
from pathlib import Path

import click

from gdfq.cli.console import print_comparison
from gdfq.report.compare import compare as compare_runs


def compare(folders: Sequence[Path], out: Path) -> None:
    """Write the page and print the table."""
    print_comparison(compare_runs(folders, out))
    click.echo(f"{'page':10}{out}")
