"""A simulated GPU, and searches of few candidates."""

from collections.abc import Iterator

import pytest
from support.simulated_gpu import simulated_gpu

from gdfq.quantizers import lsq


@pytest.fixture
def gpu() -> Iterator[None]:
    with simulated_gpu():
        yield


@pytest.fixture(autouse=True)
def _short_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lsq, "_CANDIDATE_COUNT", 6)
