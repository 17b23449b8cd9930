"""Report and comparison in a real browser, at the widths of a desktop and of a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gdfq
from gdfq.report.compare import compare

pytestmark = pytest.mark.check
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
WIDTHS_PIXELS = (1280, 390)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs a browser: chromium or chromium-browser in PATH")
    api = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install 'gdfq[browser]'"
    )
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report and a comparison."""
    place = tmp_path_factory.mktemp("pages")
    run = shutil.copytree(finished, place / "run")
    compare([run, finished], place / "comparison.html")
    return {"report": gdfq.write_report(run), "comparison": place / "comparison.html"}


@pytest.fixture(
    params=[(name, width) for name in ("report", "comparison") for width in WIDTHS_PIXELS]
)
def page(request: pytest.FixtureRequest, browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """An open page, with its console messages and the URLs that it requested."""
    name, width = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="light")
    opened = context.new_page()
    opened.messages, opened.requests = [], []
    opened.on("console", lambda message: opened.messages.append(message.text))
    opened.on("pageerror", lambda error: opened.messages.append(str(error)))
    opened.on("request", lambda request: opened.requests.append(request.url))
    opened.goto(pages[name].resolve().as_uri())
    yield opened
    context.close()


def test_page_has_no_messages_and_no_requests(page: Any) -> None:
    page.wait_for_load_state("networkidle")
    assert page.messages == []
    requests = [url for url in page.requests if not url.startswith("data:")]
    assert requests == [page.url]


def test_page_does_not_scroll_sideways(page: Any) -> None:
    width, needed = page.evaluate("[innerWidth, document.documentElement.scrollWidth]")
    assert needed <= width


def test_figures_have_size_and_stay_inside(page: Any) -> None:
    width = page.viewport_size["width"]
    figures = page.locator("figure > svg")
    assert figures.count() >= 1
    for figure in figures.all():
        box = figure.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 60
        assert box["x"] + box["width"] <= width
        assert figure.locator("path").count() > 3
    broken = "[...document.images].filter((i) => !i.complete || !i.naturalWidth).length"
    assert page.evaluate(broken) == 0


def test_labels_are_large_enough(page: Any) -> None:
    sizes = page.evaluate(
        """[...document.querySelectorAll('figure > svg text')].map((text) => {
            const svg = text.ownerSVGElement, scale = svg.getBoundingClientRect().width
                / svg.viewBox.baseVal.width;
            return parseFloat(getComputedStyle(text).fontSize) * scale; })"""
    )
    assert min(sizes) >= 7.5


def test_tables_sort(page: Any) -> None:
    table = page.locator("table.sortable").first
    head = table.locator("thead th").nth(1)

    def column() -> list[str]:
        return [
            cell.get_attribute("data-value") or cell.inner_text()
            for cell in table.locator("tbody tr td:nth-child(2)").all()
        ]

    def value(text: str) -> float | str:
        try:
            return float(text)
        except ValueError:
            return float("-inf") if text in {"", "–"} else text

    before = sorted(column())
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert [value(text) for text in column()] == sorted(map(value, column()), reverse=True)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert [value(text) for text in column()] == sorted(map(value, column()))
    assert sorted(column()) == before


def test_dark_mode_changes_page_and_figures(page: Any) -> None:
    colours = (
        "() => ['body', 'figure > svg'].map((s) => {"
        " const style = getComputedStyle(document.querySelector(s));"
        " return [style.backgroundColor, style.color]; })"
    )

    def light(colour: str) -> bool:
        return sum(map(int, colour[colour.index("(") + 1 : -1].split(",")[:3])) > 3 * 128

    (paper, ink), (_, line) = page.evaluate(colours)
    assert light(paper)
    assert not light(ink)
    page.locator("#theme").click()
    (paper, ink), (_, line) = page.evaluate(colours)
    assert not light(paper)
    assert light(ink)
    assert light(line)
    page.locator("#theme").click()
    assert light(page.evaluate(colours)[0][0])
    page.emulate_media(color_scheme="dark")
    page.reload()
    assert not light(page.evaluate(colours)[0][0])


def test_page_prints_in_light_mode(page: Any, tmp_path: Path) -> None:
    page.locator("#theme").click()
    page.emulate_media(media="print")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
    assert page.locator("#theme").is_hidden()
    page.pdf(path=tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").stat().st_size > 10_000
