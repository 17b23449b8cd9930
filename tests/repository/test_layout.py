"""Tests, benchmarks and their shared support code: allowed imports, and the table of scripts."""

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.narrowing import present
from support.places import ROOT

SCRIPTS = [
    path.stem
    for path in sorted((ROOT / "benchmarks").glob("*.py"))
    if 'if __name__ == "__main__"' in path.read_text()
]


def imports(path: Path) -> Iterator[str]:
    """The first part of the name of every module that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield present(node.module).split(".")[0]


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("src/gdfq", {"tests", "benchmarks", "support"}),
        ("support", {"tests", "benchmarks"}),
        ("benchmarks", {"tests"}),
        ("tests", {"tests"}),
    ],
)
def test_folder_imports_only_what_it_may(folder: str, forbidden: set[str]) -> None:
    found = {path: set(imports(path)) for path in (ROOT / folder).rglob("*.py")}
    assert found
    assert {path: names & forbidden for path, names in found.items() if names & forbidden} == {}


def test_benchmarks_are_imported_by_their_own_tests_alone() -> None:
    users = {
        path.parent.name for path in (ROOT / "tests").rglob("*.py") if "benchmarks" in imports(path)
    }
    assert users <= {"benchmarks"}


def test_module_names_of_support_and_benchmarks_are_distinct() -> None:
    support, benchmarks = (
        {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
        for folder in ("support", "benchmarks")
    )
    assert support & benchmarks == set()


@pytest.mark.parametrize(
    "name", [found.name for found in pkgutil.iter_modules([str(ROOT / "support")])]
)
def test_support_module_imports(name: str) -> None:
    importlib.import_module(f"support.{name}")


def test_readme_of_benchmarks_names_every_script_and_only_those() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    rows = re.findall(r"^\| .+? \| `(\w+)(?: --\w+)?` \| (.*?) \| (.*?) \|", text, re.MULTILINE)
    assert {script for script, *_ in rows} == set(SCRIPTS)
    for script, results, page in rows:
        for name in re.findall(r"`(results/[^`]+)`", results):
            assert list((ROOT / "benchmarks").glob(name.replace("NETWORK", "*"))), (script, name)
        for link in re.findall(r"\((\.\./docs/[^)]+)\)", page):
            assert (ROOT / "benchmarks" / link).is_file(), link
