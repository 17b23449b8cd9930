"""The page: sections made from a run's values, with templates that escape all text."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup
from matplotlib.figure import Figure

from gdfq.errors import UsageError, first_line
from gdfq.files.atomic import write_atomically, write_json
from gdfq.files.untrusted import within
from gdfq.report.figures import png, svg
from gdfq.report.read import Run, number
from gdfq.report.sections import Content, sections_of
from gdfq.report.source_warnings import source_warnings
from gdfq.report.verdict import Verdict, verdict
from gdfq.report.wording import size_words
from gdfq.runs.names import REPORT, REPORT_NUMBERS
from gdfq.version import __version__

FIGURES = "report"
UNEXPECTED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, UndefinedError)
"""Errors that values raise which no run writes."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """A figure, and its SVG text for the page."""

    figure: Figure
    svg: Markup


@dataclass(frozen=True, eq=False)
class Section:
    """A section of the page.

    Attributes:
        key: Its name, which is also that of its template.
        title: Its heading.
        body: Its HTML; None if it cannot be shown.
        instead: The sentence that explains why it cannot be shown.
        figures: Its figures by name.
    """

    key: str
    title: str
    body: Markup | None
    instead: str | None
    figures: Mapping[str, Drawn]


def environment() -> Environment:
    """The template environment: text is escaped, and undefined names are errors."""
    templates = Environment(
        loader=PackageLoader("gdfq.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"size": size_words, "fixed": _fixed}
    templates.globals |= {
        name.partition(".")[0]: Markup(templates.loader.get_source(templates, name)[0])  # type: ignore[union-attr] # noqa: S704
        for name in ("style.css", "script.js")
    }
    templates.globals["version"] = __version__
    return templates


def write_page(run: Run) -> Path:
    """Write the page, its figures and its numbers into the run folder.

    Raises:
        UsageError: The folder cannot be written.
    """
    templates = environment()
    summary, warnings = _verdict(run)
    sections = [
        _section(templates, run, key, title, build)
        for key, (title, build) in sections_of(run).items()
    ]
    text = templates.get_template("report.html").render(
        run=run, verdict=summary, sections=sections, file=run.file
    )
    drawn = {name: figure for section in sections for name, figure in section.figures.items()}
    values = {
        "gdfq": __version__,
        "verdict": asdict(summary),
        "warnings": warnings,
        "files": dict(run.sizes),
        "problems": dict(run.problems),
        "metrics": run.metrics,
        "evidence": run.evidence,
    }
    try:
        write_atomically(run.folder / REPORT, text.encode())
        write_json(run.folder / REPORT_NUMBERS, values)
        write_figures(within(run.folder, run.folder / FIGURES), drawn)
    except OSError as error:
        raise UsageError(
            f"the run folder must be writable; {run.folder} is not ({error.strerror}). "
            "Copy the run and make the report of the copy."
        ) from error
    return run.folder / REPORT


def write_figures(folder: Path, drawn: Mapping[str, Drawn]) -> None:
    """Write figures as NAME.svg and NAME.png."""
    folder.mkdir(exist_ok=True)
    for name, figure in drawn.items():
        write_atomically(folder / f"{name}.svg", figure.svg.encode())
        write_atomically(folder / f"{name}.png", png(figure.figure))


def _verdict(run: Run) -> tuple[Verdict, tuple[str, ...]]:
    try:
        warnings = source_warnings(run)
        return verdict(run, warnings), warnings
    except UNEXPECTED as error:
        sentence = f"This run cannot be judged: its files hold {unexpected(error)}."
        return Verdict("unknown", sentence, (), ("Quantize again.",)), ()


def _section(
    templates: Environment,
    run: Run,
    key: str,
    title: str,
    build: Callable[[Run], Content | str],
) -> Section:
    """A section of the page; if its values are missing or unexpected, a sentence that says so."""
    try:
        content = build(run)
        if isinstance(content, str):
            return Section(key, title, None, content, {})
        drawn = {
            name: Drawn(figure, Markup(svg(figure)))  # noqa: S704
            for name, figure in content.figures.items()
            if figure is not None
        }
        pictures = {name: figure.svg for name, figure in drawn.items()}
        body = templates.get_template(f"{key}.html").render(
            run=run, figures=pictures, **content.values
        )
        return Section(key, title, Markup(body), None, drawn)  # noqa: S704
    except UNEXPECTED as error:
        return Section(
            key,
            title,
            None,
            f"This section cannot be shown: its file holds {unexpected(error)}.",
            {},
        )


def unexpected(error: BaseException) -> str:
    """In words, what a file holds whose values raised one of `UNEXPECTED`."""
    return f"values that no run writes ({type(error).__name__}: {first_line(error)})"


def _fixed(value: object, digits: int = 2) -> str:
    """A number with `digits` decimal places, or a dash for anything else."""
    found = number(value)
    return "–" if found is None else f"{found:.{digits}f}"
