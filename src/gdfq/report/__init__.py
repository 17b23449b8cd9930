"""The report of a run: one page that a person can look at, made from the run's folder alone."""

from pathlib import Path

from gdfq.report.page import write_page
from gdfq.report.read import read_run


def write_report(folder: str | Path) -> Path:
    """Write `report.html`, `report.json` and `report/` (figures) into a run's folder.

    What is missing or damaged is named in its place. Returns the page's path. Raises UsageError
    when there is no run in the folder, or it cannot be written.
    """
    return write_page(read_run(folder))
