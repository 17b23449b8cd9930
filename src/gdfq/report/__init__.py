"""The report of a run: one page, made from the run folder alone."""

from pathlib import Path

from gdfq.report.page import write_page
from gdfq.report.read import read_run


def write_report(folder: str | Path) -> Path:
    """Write `report.html`, `report.json` and `report/` (figures) into a run folder.

    The page names files that are missing or damaged and shows the rest.

    Args:
        folder: A folder that `gdfq quantize` wrote.

    Returns:
        The path of the page.

    Raises:
        UsageError: The folder holds no run or cannot be written.
    """
    return write_page(read_run(folder))
