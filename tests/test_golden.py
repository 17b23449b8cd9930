"""Runs give the recorded golden values (support/golden.py)."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import golden
from support.golden import Digits, digits_values

EXPECTED = json.loads((Path(golden.__file__).with_name("golden.json")).read_text())
QUICK = {"quick-w4a4-full-0", "genie-w3a3-0", "paper-w4a4-relu-0"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The values were recorded with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compare(only: set[str] | None) -> None:
    if Digits().probe() != EXPECTED["probe"]:
        pytest.skip("golden values were recorded on a processor that rounds differently")
    values = digits_values(only)
    assert values == {name: EXPECTED[name] for name in values}


def test_a_few_golden_values_are_the_recorded_ones() -> None:
    compare(QUICK)


@pytest.mark.check
def test_all_golden_values_are_the_recorded_ones() -> None:
    compare(None)
