"""Configurations as plain values, and the fingerprints that identify them."""

import hashlib
import json
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from gdfq.files.plain_values import as_values, fingerprint, frozen_values, tagged
from gdfq.recipes import RECIPES

RECORDED = json.loads((Path(__file__).parent / "fingerprints.json").read_text())


def test_fingerprints_of_recipes_are_the_recorded_ones() -> None:
    # Measured rows and checkpoints are recognised by them. A recipe whose values change gets a new
    # one here, and its rows are measured again; a rename must change none.
    assert {name: fingerprint(recipe) for name, recipe in RECIPES.items()} == RECORDED


def test_measured_rows_are_of_the_present_recipes() -> None:
    accuracy = import_module("benchmarks.accuracy")
    there = [row for row in accuracy.PLAN if row.path.exists()]
    for row in there:
        found = json.loads(row.path.read_text())["settings"]
        assert found == accuracy.settings_of(row), row.path.name
    assert {row.recipe for row in there} >= {"fast", "genie", "synq", "mct"}


def test_every_row_is_planned() -> None:
    accuracy = import_module("benchmarks.accuracy")
    planned = {row.path for row in accuracy.PLAN}
    assert set(accuracy.RESULTS.glob("*-s[0-9]*.json")) <= planned


@tagged("Inner")
@dataclass(frozen=True)
class Inner:
    lr: float


@tagged("Outer", ignored=("note",))
@dataclass(frozen=True)
class Outer:
    inner: Inner
    sizes: tuple[int, ...]
    kind: str
    note: str = ""


@tagged("Inner", renamed={"learning_rate": "lr"})
@dataclass(frozen=True)
class RenamedInner:
    learning_rate: float


@tagged("Outer", renamed={"part": "inner"}, spellings={"relu": "t1"}, ignored=("remark",))
@dataclass(frozen=True)
class RenamedOuter:
    part: RenamedInner
    sizes: tuple[int, ...]
    kind: str
    remark: str = ""


def test_fingerprint_is_the_hash_of_the_frozen_values() -> None:
    value = Outer(Inner(0.5), (1, 2), "t1", "a note")
    text = '{"class":"Outer","inner":{"class":"Inner","lr":0.5},"kind":"t1","sizes":[1,2]}'
    assert fingerprint(value) == hashlib.sha256(text.encode()).hexdigest()[:12]


def test_fingerprint_survives_renames_of_classes_fields_spellings_and_notes() -> None:
    old = Outer(Inner(0.5), (1, 2), "t1", "a note")
    new = RenamedOuter(RenamedInner(0.5), (1, 2), "relu", "another")
    assert fingerprint(old) == fingerprint(new)
    assert as_values(new) == {
        "class": "Outer",
        "part": {"class": "Inner", "learning_rate": 0.5},
        "sizes": [1, 2],
        "kind": "relu",
        "remark": "another",
    }


@pytest.mark.parametrize(
    "changed", [{"sizes": (2, 1)}, {"kind": "full"}, {"inner": Inner(0.25)}, {"inner": None}]
)
def test_fingerprint_changes_with_any_value(changed: dict[str, Any]) -> None:
    value = Outer(Inner(0.5), (1, 2), "t1")
    assert fingerprint(replace(value, **changed)) != fingerprint(value)


def test_subclass_is_not_taken_for_its_parent() -> None:
    @dataclass(frozen=True)
    class Other(Inner):
        pass

    assert frozen_values(Other(0.5))["class"].endswith("Other")
    assert fingerprint(Other(0.5)) != fingerprint(Inner(0.5))


@dataclass(frozen=True)
class Named:
    name: str

    def plain_value(self) -> str:
        return self.name


def test_value_may_name_its_own_plain_value() -> None:
    assert as_values((Named("a"), None, 1.5, True)) == ["a", None, 1.5, True]


def test_every_part_of_a_recipe_has_a_tag_and_no_two_share_one() -> None:
    found: dict[str, Any] = {}

    def visit(value: Any) -> None:
        if isinstance(value, tuple):
            for item in value:
                visit(item)
        elif is_dataclass(value) and not hasattr(value, "plain_value"):
            name = frozen_values(value)["class"]
            assert "." not in name, f"{type(value)} has no tag"
            assert found.setdefault(name, type(value)) is type(value)
            for field in fields(value):
                visit(getattr(value, field.name))

    visit(tuple(RECIPES.values()))
    assert {"Recipe", "SpectralSource", "GridAdam"} <= set(found)
