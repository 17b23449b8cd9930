"""Fixtures that the tests of exported files share."""

import importlib.util
import sys
from collections.abc import Iterator

import pytest
from support import networks
from support.other_runtimes import FOLDER
from support.small_runs import quantized_by_fast

from gdfq.quantized import QuantizedNetwork


@pytest.fixture(scope="session")
def small() -> QuantizedNetwork:
    """A small network with learned scales; not to be changed."""
    return quantized_by_fast(networks.captured("Residual"), "w4a4")


EXECUTORCH = "executorch==1.5.1"


@pytest.fixture(scope="module")
def executorch() -> Iterator[None]:
    """ExecuTorch, which `make check` installs beside the project."""
    with pytest.MonkeyPatch.context() as patch:
        if (FOLDER / EXECUTORCH).is_dir():
            patch.setattr(sys, "path", [*sys.path, str(FOLDER / EXECUTORCH)])
            importlib.invalidate_caches()
        if importlib.util.find_spec("executorch") is None:
            pytest.skip(f"needs {EXECUTORCH} in {FOLDER}, where make check installs it")
        yield
