"""Shared fixtures; `networks.py` beside this file has the networks."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import networks
import pytest
import torch

from gdfq.capture import Captured, capture
from gdfq.recipes import PAPER, Recipe
from gdfq.sources.generator import GeneratorSource

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs an optional library belongs to `make check`, and is skipped without it."""
    for item in items:
        for needed in item.iter_markers("needs"):
            (library,) = needed.args
            absent = importlib.util.find_spec(library) is None
            skip = pytest.mark.skipif(absent, reason=f"needs the optional library {library}")
            item.add_marker(skip)
            item.add_marker(pytest.mark.check)


@pytest.fixture(params=networks.NETWORKS)
def any_network(request: pytest.FixtureRequest) -> torch.nn.Module:
    return networks.make(request.param)


@pytest.fixture(scope="session")
def residual() -> torch.nn.Module:
    return networks.make("Residual")


@pytest.fixture(scope="session")
def teacher(residual: torch.nn.Module) -> Captured:
    return capture(residual, networks.images(1))


@pytest.fixture(scope="session")
def tiny() -> Recipe:
    """The published method at a size for tests."""
    return replace(PAPER, source=GeneratorSource(batch=8)).with_steps(8)


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs the real networks and images of ../shared, which are not there")
    return SHARED
