"""A new method is a new value: no module of the package asks which method it has."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.places import ROOT

from gdfq.quantizers.base import ActivationQuantizer, WeightQuantizer
from gdfq.recipes import RECIPES
from gdfq.sources.base import Source
from gdfq.tuning.base import Tuning

MODULES = sorted((ROOT / "src/gdfq").rglob("*.py"))


def subclasses(cls: type) -> set[str]:
    direct: list[type] = cls.__subclasses__()
    return {subclass.__name__ for subclass in direct}.union(*map(subclasses, direct))


METHODS = set[str]().union(*map(subclasses, (Source, Tuning, WeightQuantizer, ActivationQuantizer)))
FAMILIES = {recipe.quantizers.name for recipe in RECIPES.values()}


def questions(tree: ast.AST) -> Iterator[str]:
    """What asks for the type of a method, or compares the name of a family."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"isinstance", "type"}:
            names = {n.id for a in node.args[1:] for n in ast.walk(a) if isinstance(n, ast.Name)}
            if names & METHODS:
                yield ast.unparse(node)
        if isinstance(node, ast.Compare):
            constants = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            if constants & FAMILIES:
                yield ast.unparse(node)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_does_not_ask_which_method_it_has(path: Path) -> None:
    assert list(questions(ast.parse(path.read_text()))) == []


def test_search_finds_tests_of_the_method() -> None:
    assert {"ImagePool", "Reconstruction", "RoundedWeight", "LearnedRange"} <= METHODS
    assert {"min-max", "learned", "learned-tokens", "rounded"} == FAMILIES
    for text in (
        "isinstance(recipe.source, ImagePool)",
        "isinstance(tuning, Distillation | Reconstruction)",
        "recipe.quantizers.name == 'learned'",
        "family.name in ('learned', 'rounded')",
    ):
        assert list(questions(ast.parse(text))) == [text]
    assert list(questions(ast.parse("isinstance(module, WeightQuantizer)"))) == []
