"""Fixtures that the tests of exported files share."""

import pytest
from support import networks
from support.small_runs import quantized_by_fast

from gdfq.quantized import QuantizedNetwork


@pytest.fixture(scope="session")
def small() -> QuantizedNetwork:
    """A small network with learned scales; not to be changed."""
    return quantized_by_fast(networks.captured("Residual"), "w4a4")
