"""Output that several commands share."""

from collections.abc import Mapping, Sequence

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gdfq.effort import counted
from gdfq.plan.plan import Plan
from gdfq.report.compare import Comparison, Row
from gdfq.report.denoiser import is_denoiser
from gdfq.report.drop import drop_of
from gdfq.report.language import is_language_model
from gdfq.report.read import Run, number
from gdfq.report.source_warnings import source_warnings
from gdfq.report.verdict import verdict, why_not_estimated
from gdfq.report.wording import errors_by_output, lost_or_gained, size_words, smaller


def print_run(run: Run) -> None:
    """Print the results of a run before and after quantization, and its verdict in one sentence."""
    metrics = run.metrics
    table = Table("", "before", "after", "")
    before = number(metrics.get("float_bytes"))
    if run.file is not None and before is not None:
        _, size = run.file
        weights = f"{size_words(before)} of weights"
        table.add_row("size", weights, f"{size_words(size)} file", smaller(before, size))
    if run.drop is not None:
        tops = (metrics[who]["top1"] for who in ("teacher", "student"))
        table.add_row("top-1", *(f"{top:.2f} %" for top in tops), lost_or_gained(run.drop))
    if language := metrics.get("language"):
        table.add_row(
            "perplexity",
            f"{language['teacher_perplexity']:.3f}",
            f"{language['perplexity']:.3f}",
            f"same first choice for {language['agreement']:.1f} % of the tokens",
        )
    if own := metrics.get("own_text"):
        table.add_row(
            "own text",
            "",
            f"KL {own['divergence']:.4f}",
            f"same first choice for {own['agreement']:.1f} % of {own['tokens']} held-out tokens",
        )
    student = metrics.get("student") or {}
    for output, error in errors_by_output(student).items():
        table.add_row(output, "", "", f"{error:.2f} % from the original's")
    for output, cosine in (student.get("cosine") or {}).items():
        table.add_row(output, "", "", f"cosine {cosine:.4f} with the original's")
    for output, share in (student.get("decisions_percent") or {}).items():
        table.add_row(output, "", "", f"{share:.2f} % of the decisions are the original's")
    if samples := metrics.get("samples"):
        found_in = f"PSNR {samples['psnr']:.1f} dB, {samples['images']} images from the same noise"
        table.add_row("images", "", "", found_in)
    steps = metrics["effort"]["steps"] if "effort" in metrics else metrics["steps"]
    tuned = counted(steps, "step") if steps else "without tuning"
    table.add_row("time", "", f"{metrics['seconds']['total']:.0f} s", tuned)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    found = verdict(run, source_warnings(run))
    console.print(found.sentence, markup=False)
    has_estimate = not (is_language_model(run) or is_denoiser(run))
    if has_estimate and drop_of(run) is None and (reason := why_not_estimated(run)):
        console.print(f"No estimate of the accuracy drop: {reason}", markup=False)
    console.print(f"{'run':10}{run.folder}", markup=False)


def print_comparison(comparison: Comparison) -> None:
    """Print runs side by side, and below them the runs that cannot be compared."""
    table = Table("run", "bits", "recipe", "top-1", "lost", "expected", "size", "seconds")
    for row in comparison.rows:
        table.add_row(*map(escape, _cells(row)))
    console = Console(highlight=False)
    console.print(table)
    for note in comparison.notes:
        console.print(f"note: {note}", style="yellow", markup=False)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        row.bits,
        row.recipe,
        "–" if row.accuracy is None else f"{row.accuracy:.2f} %",
        "–" if row.drop is None else f"{row.drop:.2f}",
        row.expected,
        "–" if row.bytes is None else size_words(row.bytes),
        "–" if row.seconds is None else f"{row.seconds:.0f}",
    )


def print_bits(bits: Mapping[str, int]) -> None:
    """Print the layers of each bit width, one line for each width."""
    for width in sorted(set(bits.values())):
        names = [name for name, chosen in bits.items() if chosen == width]
        click.echo(f"{f'{width} bits':10}{counted(len(names), 'layer')}: {', '.join(names)}")


_ENDS_EARLY = 0.85
"""Share of its budget below which a plan is said to end early."""


def budget_in_words(plan: Plan) -> str:
    """Return how long a plan with a budget will take; empty without a budget."""
    if plan.budget is None or plan.planned_seconds is None:
        return ""
    seconds = f", about {plan.planned_seconds:.0f} s of {plan.budget:g} s"
    if plan.planned_seconds < _ENDS_EARLY * plan.budget:
        return f"{seconds}: it ends early, because more images and steps are of no use"
    return seconds


def repetition(plan: Plan) -> str:
    """Return the options that repeat a run with a budget."""
    options = plan.effort_options.items()
    return " ".join(f"--{name} {value}" for name, value in options if value is not None)


def warn(message: str) -> None:
    """Print a warning on standard error."""
    click.secho(f"warning: {message}", fg="yellow", err=True)


def warn_about_normalisation(assumed: Sequence[str]) -> None:
    """Warn about parts of the input normalisation ("mean", "std") that are assumed."""
    if assumed:
        missing = " and ".join(f"--{name}" for name in assumed)
        warn(
            f"no {missing} given, so mean 0 and std 1 are used: the network is assumed to take "
            "pixels in 0..1. If it was trained on normalised images, the result will be poor: "
            "give their mean and std."
        )
