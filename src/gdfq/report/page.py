"""The page: sections from the run's values, in templates that escape every name."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup
from matplotlib.figure import Figure

from gdfq.errors import UsageError, first_line
from gdfq.files.atomic import write_atomically, write_json
from gdfq.files.untrusted import within
from gdfq.report.alarms import alarms
from gdfq.report.figures import png, svg
from gdfq.report.read import Run, number
from gdfq.report.sections import SECTIONS, Content
from gdfq.report.verdict import Verdict, size_words, verdict
from gdfq.runs.names import REPORT, REPORT_NUMBERS
from gdfq.version import __version__

FIGURES = "report"
_BROKEN = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, UndefinedError)
"""What values raise that are not those that a run writes."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """A figure, and what the page shows of it."""

    figure: Figure
    svg: Markup


@dataclass(frozen=True, eq=False)
class Section:
    """A part of the page, or the sentence that stands in its place."""

    key: str
    title: str
    body: Markup | None
    instead: str | None
    figures: Mapping[str, Drawn]


def environment() -> Environment:
    """Of the templates: all is escaped, and what is not defined is an error."""
    made = Environment(
        loader=PackageLoader("gdfq.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"size": size_words, "fixed": _fixed}
    made.globals |= {
        name.partition(".")[0]: Markup(made.loader.get_source(made, name)[0])  # type: ignore[union-attr] # noqa: S704
        for name in ("style.css", "script.js")
    }
    made.globals["version"] = __version__
    return made


def write_page(run: Run) -> Path:
    """Write the page, its figures and its numbers into the run's folder."""
    templates = environment()
    found, heard = _judged(run)
    sections = [
        _section(templates, run, key, title, build) for key, (title, build) in SECTIONS.items()
    ]
    text = templates.get_template("report.html").render(
        run=run, verdict=found, sections=sections, file=run.file
    )
    drawn = {name: figure for section in sections for name, figure in section.figures.items()}
    values = {
        "gdfq": __version__,
        "verdict": asdict(found),
        "alarms": heard,
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
            f"the run's folder must be writable; {run.folder} is not ({error.strerror}). "
            "Copy the run and report on the copy."
        ) from error
    return run.folder / REPORT


def write_figures(folder: Path, drawn: Mapping[str, Drawn]) -> None:
    """Write figures as NAME.svg and NAME.png."""
    folder.mkdir(exist_ok=True)
    for name, figure in drawn.items():
        write_atomically(folder / f"{name}.svg", figure.svg.encode())
        write_atomically(folder / f"{name}.png", png(figure.figure))


def _judged(run: Run) -> tuple[Verdict, tuple[str, ...]]:
    try:
        heard = alarms(run.evidence.get("images"), run.history)
        return verdict(run, heard), heard
    except _BROKEN as error:
        said = f"Nothing can be said about this run: its files hold {_odd(error)}."
        return Verdict("unknown", said, (), ("Quantize again.",)), ()


def _section(
    templates: Environment,
    run: Run,
    key: str,
    title: str,
    build: Callable[[Run], Content | str],
) -> Section:
    """A section of the page; where its values are missing or odd, a sentence that says so."""
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
    except _BROKEN as error:
        return Section(key, title, None, f"This cannot be shown: its file holds {_odd(error)}.", {})


def _odd(error: BaseException) -> str:
    return f"values that no run writes ({type(error).__name__}: {first_line(error)})"


def _fixed(value: object, digits: int = 2) -> str:
    """A number with so many digits, or a dash where there is none."""
    found = number(value)
    return "–" if found is None else f"{found:.{digits}f}"
