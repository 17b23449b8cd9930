"""Fixtures that tests of several packages use; `support/networks.py` has the networks."""

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from safetensors.torch import load_file, save_file
from support import networks
from support.places import SHARED
from support.trained_digits import TrainedDigits

import gdfq
from gdfq import demo
from gdfq.cli import main
from gdfq.graph.capture import Captured
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import PAPER, Recipe
from gdfq.sources.generator import GeneratorSource

# No test goes by time: a busy machine is no failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that need an optional library with `check`, and skip them without it."""
    for item in items:
        for needed in item.iter_markers("needs"):
            (library,) = needed.args
            absent = importlib.util.find_spec(library) is None
            skip = pytest.mark.skipif(absent, reason=f"needs the optional library {library}")
            item.add_marker(skip)
            item.add_marker(pytest.mark.check)


_LISTED_ONCE = (
    ("torch.onnx._internal.exporter._registration", "ONNXRegistry", "from_torchlib"),
    ("torch.export.exported_program", "", "_collect_all_valid_cia_ops"),
    ("torch.export.decomp_utils", "", "_collect_all_valid_cia_ops"),
)
"""Lists of all operators that PyTorch makes for each trace and for each ONNX file: module, class, function.

They are half of the time of a small network's file. Private: another torch may name them otherwise.
"""


@pytest.fixture(scope="session", autouse=True)
def _operators_are_listed_once() -> Iterator[None]:
    """Keep lists that are always the same."""
    with pytest.MonkeyPatch.context() as patch:
        for module, owner, name in _LISTED_ONCE:
            place: Any = importlib.import_module(module)
            place = getattr(place, owner, None) if owner else place
            if hasattr(place, name):
                kept = staticmethod(functools.cache(getattr(place, name)))
                patch.setattr(place, name, kept)
        yield


@pytest.fixture(params=networks.NETWORKS)
def network_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def any_network(network_name: str) -> torch.nn.Module:
    return networks.make(network_name)


@pytest.fixture
def any_teacher(network_name: str) -> Captured:
    """`any_network` as it is captured."""
    return networks.captured(network_name)


@pytest.fixture(scope="session")
def residual() -> torch.nn.Module:
    return networks.make("Residual")


@pytest.fixture(scope="session")
def teacher() -> Captured:
    return networks.captured("Residual")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> TrainedDigits:
    """The demonstration's network, trained once for all test processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder if worker_id == "master" else folder.parent
    file = folder / "digits.safetensors"
    training, held_out = demo.load_digits()
    with FileLock(f"{file}.lock"):
        if not file.exists():
            save_file(demo.train(training).state_dict(), file)
    network = demo.DigitsNetwork()
    network.load_state_dict(load_file(file))
    return TrainedDigits(file, network.eval(), training, held_out)


@pytest.fixture(scope="session")
def tiny() -> Recipe:
    """The published method at a size for tests."""
    return replace(PAPER, source=GeneratorSource(batch=8)).with_steps(8)


@pytest.fixture(scope="session")
def labelled() -> tuple[torch.Tensor, torch.Tensor]:
    """Random pixels and labels."""
    draw = np.random.default_rng(0)
    pixels = torch.from_numpy(draw.integers(0, 256, (40, *networks.SHAPE), np.uint8))
    return pixels, torch.arange(40) % networks.CLASSES


@pytest.fixture(scope="session")
def quantized(
    teacher: Captured, tiny: Recipe, labelled: tuple[torch.Tensor, torch.Tensor]
) -> QuantizedNetwork:
    """A small quantized network that was tested; not to be changed."""
    return gdfq.quantize(
        teacher, networks.images(1), "w3a4", tiny, test=labelled, layer_bits=["fc=8"]
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with all that `gdfq quantize` writes; not to be changed."""
    place = tmp_path_factory.mktemp("finished")
    (place / "net.py").write_text("from networks import Residual as factory\n")
    (place / "networks.py").write_text(Path(networks.__file__).read_text())
    save_file(networks.make("Residual").state_dict(), place / "w.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (40, *networks.SHAPE), np.uint8)
    np.savez(place / "test.npz", images=pixels, labels=np.arange(40) % networks.CLASSES)
    words = ["quantize", f"{place}/net.py:factory", "--weights", f"{place}/w.safetensors"]
    words += ["--input", "3x8x8", "--mean", ".5,.5,.5", "--std", ".3,.3,.3", "--recipe", "paper"]
    words += ["--steps", "12", "--test", f"{place}/test.npz", "--out", f"{place}/run"]
    assert main(words) == 0
    return place / "run"


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs the real networks and images of ../shared, which are not there")
    return SHARED


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a factory, its weights in several forms, and labelled images."""
    (tmp_path / "net.py").write_text(
        "from networks import Residual\n"
        "def factory():\n    return Residual()\n"
        "def broken():\n    raise RuntimeError('no disk')\n"
        "def nothing():\n    return None\n"
        "value = 3\n"
    )
    (tmp_path / "networks.py").write_text(Path(networks.__file__).read_text())
    state = networks.make("Residual").state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    prefixed = {
        f"module.{name}": value
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }
    torch.save({"state_dict": prefixed, "epoch": 3}, tmp_path / "nested.pt")
    images = np.random.default_rng(0).integers(0, 256, (40, *networks.SHAPE), np.uint8)
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(40) % networks.CLASSES)
    np.savez(tmp_path / "far.npz", images=images, labels=np.arange(40))
    np.savez(tmp_path / "bare.npz", images=images)
    np.savez(
        tmp_path / "wide.npz", images=np.zeros((4, 3, 8, 9), np.uint8), labels=np.zeros(4, int)
    )
    return tmp_path
