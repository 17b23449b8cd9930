"""The documentation site is complete, builds without warnings, and loads nothing from other hosts."""

import importlib.util
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from types import ModuleType

import click
import pytest
from support import pages
from support.narrowing import instance, present
from support.places import ROOT

import gdfq
from gdfq.cli.app import cli


def of_build(name: str) -> ModuleType:
    path = ROOT / "docs" / "build" / f"{name}.py"
    spec = present(importlib.util.spec_from_file_location(f"build_{name}", path))
    module = importlib.util.module_from_spec(spec)
    present(spec.loader).exec_module(module)
    return module


def test_reference_has_every_command_and_option() -> None:
    text = of_build("commands").reference()
    for name, command in cli.commands.items():
        _, found, rest = text.partition(f"\n## gdfq {name}\n")
        assert found
        section = rest.partition("\n## ")[0]
        assert present(command.help).split("\n")[0] in section
        for parameter in command.params:
            if isinstance(parameter, click.Argument):
                assert parameter.make_metavar(click.Context(command)) in section
            elif not instance(parameter, click.Option).hidden:
                assert max(parameter.opts, key=len) in section
    assert "| maximum size of the ONNX file" not in text  # the words before it are there, too
    assert "With --bits auto: maximum size of the ONNX file" in text


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return out


@pytest.mark.needs("mkdocs")
@pytest.mark.needs("mkdocstrings")
def test_site_has_every_page(site: Path) -> None:
    made = {path.relative_to(site).with_suffix(".md") for path in site.rglob("*.html")}
    there = {page.relative_to(ROOT / "docs") for page in pages.PAGES[1:]}
    assert there <= made
    for page in there:
        menu = (site / "index.html").read_text()
        assert f'href="{page.with_suffix(".html")}"' in menu or page.name == "index.md"


@pytest.mark.needs("mkdocs")
@pytest.mark.needs("mkdocstrings")
def test_site_documents_public_names_and_parameters(site: Path) -> None:
    text = unescape((site / "reference" / "python.html").read_text())
    headings = set(re.findall(r"<h[23][^>]*>\s*([\w.]+)", text))
    assert {f"gdfq.{name}" for name in set(gdfq.__all__) - {"__version__"}} <= headings
    words = " ".join(re.sub(r"<[^>]*>", " ", text).split())
    assert re.search(r"bits \( str \| Bits \| None , default: None \) – Bits of weights", words)


@pytest.mark.needs("mkdocs")
@pytest.mark.needs("mkdocstrings")
def test_site_loads_nothing_from_other_hosts(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.findall(r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//', page.read_text())
        links = re.findall(r'<link[^>]*rel="([^"]*)"[^>]*href="(?:https?:)?//', page.read_text())
        assert set(links) <= {"canonical"}
