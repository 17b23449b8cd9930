"""Shared fixtures; `networks.py` beside this file has the networks."""

from dataclasses import replace
from pathlib import Path

import networks
import pytest
import torch
from hypothesis import settings

from gdfq.capture import Captured, capture
from gdfq.recipes import PAPER, Recipe
from gdfq.sources.generator import GeneratorSource

# No test goes by time: a busy machine is no failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

SHARED = Path(__file__).resolve().parents[2] / "shared"


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
