"""Files about the project: they parse, and they name targets, files and versions that exist."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import pages
from support.places import ROOT

from gdfq.version import __version__

TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "benchmarks").glob("*.md"),
    *(ROOT / ".github").rglob("*.md"),
]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_make_target_is_described_in_help() -> None:
    text = (ROOT / "Makefile").read_text()
    described = set(re.findall(r"^([a-z]+):.*## \S", text, re.MULTILINE))
    (phony,) = re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    assert described == TARGETS == set(phony.split())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_names_only_make_targets_that_exist(page: Path) -> None:
    code = [block.code for block in pages.blocks(page) if block.language == "bash"]
    code += re.findall(r"`(make .+?)`", page.read_text())
    found = re.findall(r"^make ([a-z]+(?: [a-z]+)*)", "\n".join(code), re.MULTILINE)
    assert {target for targets in found for target in targets.split()} <= TARGETS


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_workflow_runs_only_make_targets_that_exist(path: Path) -> None:
    jobs = load(path)["jobs"].values()
    matrices = [job.get("strategy", {}).get("matrix", {}) for job in jobs]
    targets = {target for matrix in matrices for target in matrix.get("target", [])}
    for job in jobs:
        commands = [step["run"] for step in job["steps"] if "run" in step]
        assert commands
        for command in commands:
            program, *words = re.sub(r"\$\{\{.*?\}\}", "", command).split()
            assert program == "make"
            targets |= {word for word in words if "=" not in word}
    assert targets
    assert targets <= TARGETS


def test_workflows_test_every_declared_python_and_both_sets_of_versions() -> None:
    (job,) = (load(path)["jobs"].get("tests") for path in WORKFLOWS if path.stem == "checks")
    matrix = job["strategy"]["matrix"]
    text = (ROOT / "pyproject.toml").read_text()
    assert matrix["python"] == re.findall(r"Python :: (3\.\d+)", text)
    used = {*matrix["versions"], *(entry["versions"] for entry in matrix["include"])}
    assert used == {path.name for path in (ROOT / "requirements").iterdir()}


@pytest.mark.parametrize("path", FORMS, ids=name_of)
def test_issue_form_has_what_the_forge_requires(path: Path) -> None:
    form = load(path)
    assert form["name"]
    assert form["description"]
    inputs = [element for element in form["body"] if element["type"] != "markdown"]
    identifiers = [element["id"] for element in inputs]
    assert len(set(identifiers)) == len(identifiers) > 0
    for element in inputs:
        assert element["type"] in {"input", "textarea", "dropdown", "checkboxes"}
        assert element["attributes"]["label"]
        assert element["type"] not in {"dropdown", "checkboxes"} or element["attributes"]["options"]


def test_commit_hooks_run_the_tools_of_the_environment() -> None:
    (repository,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert all(hook["entry"].startswith(".venv/bin/") for hook in repository["hooks"])
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff", "ruff-format", "mypy"]


def test_citation_and_changelog_name_the_version() -> None:
    assert load(ROOT / "CITATION.cff")["version"] == __version__
    versions = re.findall(r"^## \[(.+?)\] - ", changelog(), re.MULTILINE)
    assert versions[0] == __version__.partition(".dev")[0]


def test_changelog_has_the_sections_of_keep_a_changelog() -> None:
    sections = set(re.findall(r"^### (.+)$", changelog(), re.MULTILINE))
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    dates = re.findall(r"^## \[.+?\] - (.+)$", changelog(), re.MULTILINE)
    assert dates.count("Unreleased") <= 1
    assert dates == sorted(dates, reverse=True)  # "Unreleased" is greater than any date


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_of_a_project_page_lead_to_files(name: str) -> None:
    links = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", (ROOT / name).read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def changelog() -> str:
    return (ROOT / "CHANGELOG.md").read_text()
