"""Code in README and docs runs, and what the pages name exists."""

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from support import pages
from support.narrowing import instance, present
from support.places import ROOT

from gdfq import RECIPES
from gdfq.functional import losses
from gdfq.sources.pool import ImagePool
from gdfq.sources.spectral import SpectralSource
from gdfq.tuning.distill import Distillation

DOCS = ROOT / "docs"
EQUATIONS = (DOCS / "equations.md").read_text()
SOURCES = [path.read_text() for path in (ROOT / "src").rglob("*.py")]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def with_mark(*marks: str | None) -> list[Path]:
    return [page for page in pages.PAGES if any(b.mark in marks for b in pages.blocks(page))]


FIRST_PAGES = [
    ROOT / "README.md",
    *(ROOT / f"docs/{n}.md" for n in ("networks", "extend")),
]
"""The pages that a new user begins with. All pages take two minutes."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty folder to work in, whose modules Python finds and forgets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


# What libraries warn of, a reader would see as well; it is no error of the page.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", FIRST_PAGES, ids=name_of)
def test_page_code_runs(page: Path, place: Path) -> None:
    """Commands of gdfq alone run in this process; `make check` gives all pages to a shell."""
    chosen = [block for block in pages.blocks(page) if block.mark is None]
    pages.run(page, chosen, place, shell=False)


@pytest.mark.check
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", with_mark(None, "check"), ids=name_of)
def test_page_code_runs_in_a_shell(page: Path, place: Path) -> None:
    blocks = [block for block in pages.blocks(page) if block.mark != "skip"]
    pages.run(page, [block for block in blocks if not block.absent], place)
    absent = sorted({present(block.library) for block in blocks if block.absent})
    if absent:
        pytest.skip(f"the rest of {page.name} needs the optional library {', '.join(absent)}")


@pytest.mark.parametrize("page", pages.PAGES, ids=name_of)
def test_page_has_no_unrecognized_block(page: Path) -> None:
    text, found = page.read_text(), pages.blocks(page)
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(found)
    assert text.count("<!-- test:") == sum(block.mark is not None for block in found)
    assert {block.language for block in found} <= {"python", "bash", "text"}
    assert {block.mark for block in found} <= {None, "check", "skip"}


@pytest.mark.parametrize("page", pages.PAGES, ids=name_of)
def test_links_lead_to_what_readers_can_reach(page: Path) -> None:
    """Pages of docs/ become a site that holds docs/ alone."""
    root = DOCS if page.is_relative_to(DOCS) else ROOT
    for link in re.findall(r"\]\((?![a-z]+:)([^)#\s]+)", page.read_text()):
        target = (page.parent / link).resolve()
        assert target.is_relative_to(root), link
        assert target.exists(), link


def test_blocks_of_a_hand_made_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        'Text\n\n```python title="a.py"\nx = 1\n```\n'
        "<!-- test: check nothing_of_this_name (slow) -->\n```bash\nfalse\n```\n"
        "- a list\n\n    ```python\n    if True:\n        y = 2\n    ```\n"
    )
    file, command, listed = pages.blocks(page)
    assert (file.title, file.code, file.mark, file.line) == ("a.py", "x = 1\n", None, 4)
    assert (command.mark, command.library, command.absent) == (
        "check",
        "nothing_of_this_name",
        True,
    )
    assert listed.code == "if True:\n    y = 2\n"
    assert pages.run(page, [file, listed], tmp_path)["y"] == 2
    assert (tmp_path / "a.py").read_text() == "x = 1\n"
    with pytest.raises(AssertionError, match=r"page.md, line 8"):
        pages.run(page, [command], tmp_path)


def test_gdfq_commands_recognizes_plain_commands() -> None:
    code = "gdfq a 'b c' \\\n  --d e  # a remark\n# another\n\ngdfq f\n"
    assert pages.gdfq_commands(code) == [["a", "b c", "--d", "e"], ["f"]]
    assert pages.gdfq_commands("gdfq a\nmake b\n") is None
    assert pages.gdfq_commands("gdfq a > b\n") is None
    assert pages.gdfq_commands("gdfq a*\n") is None
    assert pages.gdfq_commands("gdfq 'a*'\n") == [["a*"]]


@pytest.mark.parametrize("name", re.findall(r"`(gdfq\.[\w.]+)`", EQUATIONS))
def test_function_named_in_equations_exists(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(import_module(module), attribute)


def test_public_losses_have_an_equation() -> None:
    public = {
        name
        for name, value in vars(losses).items()
        if getattr(value, "__module__", "") == losses.__name__ and not name.startswith("_")
    } - {"inner"}  # arithmetic that they share
    assert public <= {
        name.rpartition(".")[2] for name in re.findall(r"`(gdfq\.[\w.]+)`", EQUATIONS)
    }


def test_cited_papers_have_an_equation() -> None:
    cited = {number for text in SOURCES for number in re.findall(r"\b\d{4}\.\d{5}\b", text)}
    assert cited <= set(re.findall(r"\b\d{4}\.\d{5}\b", EQUATIONS))


def test_table_of_recipes_is_complete() -> None:
    table = (DOCS / "recipes.md").read_text().split("| recipe |")[1].split("\n\n")[0]
    first_column = [row.split("|")[1] for row in table.splitlines()[2:]]
    named = [name for cell in first_column for name in re.findall(r"`([a-z][a-z-]*)`", cell)]
    assert sorted(named) == sorted(RECIPES)


def test_readme_names_existing_recipes() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"recipe(?: `|=\"| )([a-z-]+)[`\"]", text))
    named |= set(re.findall(r"--recipe ([a-z-]+)", text))
    assert named
    assert named <= set(RECIPES)


def test_recipes_page_has_the_numbers_of_fast() -> None:
    page = " ".join((DOCS / "recipes.md").read_text().split())
    fast, quick = RECIPES["fast"], RECIPES["quick"]
    fast_pool, quick_pool = (instance(recipe.source, ImagePool) for recipe in (fast, quick))
    large = fast_pool.fitted((3, 224, 224))
    spectral = instance(fast_pool.source, SpectralSource)
    adam = spectral.optimizer
    for text in (
        f"{fast_pool.images:,} images",
        f"{large.images:,} of 224 x 224",
        f"{large.batch} of 224 x 224",
        f"Adam (rate {adam.lr}, β = {adam.betas})",
        f"{spectral.batch} at a time for {spectral.iterations} iterations",
        f"{fast.steps:,} steps",
        f"batches of {fast.source.batch} images",
        f"T = {instance(fast.tuning, Distillation).temperature:.0f}",
        f"`quick` has {quick_pool.images} images, {quick.steps} steps of {quick.source.batch} images",
    ):
        assert text in page
