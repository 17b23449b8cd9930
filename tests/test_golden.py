"""Runs give the recorded golden values (support/golden.py)."""

from collections.abc import Iterator

import pytest
import torch
from support.golden import Digits, digits_values, recorded

QUICK = {"quick-w4a4-full-0", "genie-w3a3-0", "paper-w4a4-relu-0"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The values were recorded with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compare(only: set[str] | None) -> None:
    digits = Digits()
    expected = recorded().get(digits.probe())
    if expected is None:
        pytest.skip("golden values were recorded on processors that round differently")
    values = digits_values(digits, only)
    known = {name: value for name, value in values.items() if name in expected}
    assert known
    assert known == {name: expected[name] for name in known}


def test_a_few_golden_values_are_the_recorded_ones() -> None:
    compare(QUICK)


@pytest.mark.check
def test_all_golden_values_are_the_recorded_ones() -> None:
    compare(None)
