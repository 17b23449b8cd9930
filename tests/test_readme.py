"""The documents tell the truth: their code runs, and the functions they name exist."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from gdfq import RECIPES

ROOT = Path(__file__).resolve().parents[1]


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        space: dict = {}
        exec(compile(block, "README.md", "exec"), space)
    assert space["logits"].equal(space["same"](space["example"]))
    assert space["images"].shape == (16, 3, 32, 32)


@pytest.mark.parametrize(
    "name", re.findall(r"`(gdfq\.[\w.]+)`", (ROOT / "docs" / "equations.md").read_text())
)
def test_every_function_of_the_equations_exists(name):
    module, attribute = name.rsplit(".", 1)
    assert hasattr(import_module(module), attribute)


def test_the_readme_names_real_recipes():
    table = (ROOT / "README.md").read_text().split("| recipe |")[1].split("\n\n")[0]
    for name in re.findall(r"`([a-z][a-z-]*)`", table):
        assert name in RECIPES
