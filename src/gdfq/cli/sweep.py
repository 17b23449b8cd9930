"""Many runs from one file."""

from pathlib import Path

import click

from gdfq.errors import GdfqError, UsageError
from gdfq.runs.sweep import read_sweep
from gdfq.runs.sweep_runner import TABLE_CSV, TABLE_JSON, Row, run_sweep, table, usable_cores


def sweep(file: Path, *, out: Path | None, jobs: int | None, threads: int) -> int:
    """Run the sweep of a file. Returns 0, or 130 if it was interrupted."""
    grid = read_sweep(file)
    out = out or file.with_suffix("")
    if out == file:
        raise UsageError(f"a folder cannot have the name of the file {file}. Give --out.")
    jobs = max(1, usable_cores() // threads) if jobs is None else jobs

    def tell(row: Row, ended: int, total: int) -> None:
        measured = row.student_top1 is not None
        result = row.error or (f"top-1 {row.student_top1:.2f} %" if measured else row.status)
        click.echo(f"{ended}/{total}  {row.folder}  {result}", err=True)

    try:
        rows = run_sweep(grid, out, home=file.parent, jobs=jobs, threads=threads, tell=tell)
    except KeyboardInterrupt:
        click.secho(f"stopped; the same command resumes {out}.", fg="yellow", err=True)
        return 130
    click.echo(f"\n{table(rows)}\n\n{'table':10}{out / TABLE_JSON}, {out / TABLE_CSV}")
    failed = [f"\n  {row.folder}: {row.error}" for row in rows if row.status != "finished"]
    if failed:
        raise GdfqError(f"{len(failed)} of {len(rows)} runs:{''.join(failed)}")
    return 0
