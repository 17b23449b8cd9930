"""How many bytes the checkpoints of a run write: what does not change is written once."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import networks
from support.narrowing import instance
from support.small_runs import same, small, state

import gdfq
from gdfq import RECIPES, UsageError
from gdfq.data.datasets import load_data
from gdfq.data.tensors import summary_of
from gdfq.execution.checkpoints import Checkpoints
from gdfq.execution.progress import Listener, Step
from gdfq.files import atomic
from gdfq.graph.capture import Captured, capture
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import Recipe
from gdfq.sources.pool import ImagePool

SHAPE = (3, 64, 64)
IMAGES, IMAGE_BYTES = 64, 4 * 3 * 64 * 64
SMALL = 50_000
"""More bytes than a checkpoint has besides images: a few random states of 5,056 bytes, and the
student of this network."""


@pytest.fixture(scope="module")
def network() -> Captured:
    return capture(networks.make("Residual"), networks.images(1, shape=SHAPE))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Name and bytes of each file that is written."""
    files: list[tuple[str, int]] = []
    write = atomic.write_checked

    def counted(path: Path, data: bytes, check: Callable[[Path], Any]) -> Any:
        files.append((path.name, len(data)))
        return write(path, data, check)

    monkeypatch.setattr(atomic, "write_checked", counted)
    return files


def pooled(name: str) -> Recipe:
    recipe = small(RECIPES[name])
    pool = instance(recipe.source, ImagePool)
    return replace(recipe, source=replace(pool, images=IMAGES, batch=32, pixels=None))


def quantized(
    network: Captured,
    recipe: Recipe,
    folder: Path,
    listener: Listener = lambda step: None,
    **options: Any,
) -> QuantizedNetwork:
    return gdfq.quantize(
        network,
        networks.images(1, shape=SHAPE),
        "w4a4",
        recipe,
        steps=12,
        checkpoints=Checkpoints(folder, clock=lambda: 0.0),
        listener=listener,
        **options,
    )


@pytest.fixture
def after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is written after each step, however much that is."""
    monkeypatch.setattr(Checkpoints, "_wait", lambda _: 0.0)


def size_of(files: list[tuple[str, int]], kind: str) -> int:
    return sum(size for name, size in files if name.startswith(kind))


@pytest.mark.usefixtures("after_each_step")
def test_run_writes_each_image_once(
    network: Captured, tmp_path: Path, written: list[tuple[str, int]]
) -> None:
    """The images of a pool, of which all batches, examples and recent images are made."""
    quantized(network, pooled("quick"), tmp_path)
    checkpoints = sum(name.startswith("checkpoint") for name, _ in written)
    assert checkpoints > 50
    assert size_of(written, "piece") < 1.02 * IMAGES * IMAGE_BYTES
    assert size_of(written, "checkpoint") < checkpoints * SMALL
    assert SMALL < 1.2 * IMAGE_BYTES  # otherwise this would say nothing


@pytest.mark.usefixtures("after_each_step")
def test_run_on_given_images_does_not_write_them(
    network: Captured, tmp_path: Path, written: list[tuple[str, int]]
) -> None:
    """They are read again: also the batches of a recipe without a pool."""
    data = networks.images(40, shape=SHAPE)
    for name in ("real", "paper-real"):
        recipe = pooled(name) if name == "real" else small(RECIPES[name])
        quantized(network, recipe, tmp_path / name, data=data)
        assert len(written) > 10
        assert max(size for _, size in written) < SMALL < 1.2 * IMAGE_BYTES
        written.clear()


class StopError(Exception):
    """Stands for anything that stops a run."""


def stopping_at(stage: str, index: int) -> Listener:
    def listener(step: Step) -> None:
        if (step.stage, step.index) == (stage, index):
            raise StopError

    return listener


def test_run_on_given_images_resumes_with_these_images_alone(
    network: Captured, tmp_path: Path
) -> None:
    """Also if they differ in an image that the identity of the data does not hash."""
    data = networks.images(40, shape=SHAPE)
    expected = quantized(network, pooled("real"), tmp_path / "whole", data=data)
    with pytest.raises(StopError):
        quantized(network, pooled("real"), tmp_path / "run", stopping_at("tune", 8), data=data)
    other = data.clone()
    other[1, 0, 0, 0] += 1
    assert summary_of(load_data(data, SHAPE, 5)) == summary_of(load_data(other, SHAPE, 5))
    with pytest.raises(UsageError, match="given images are not those that the run started with"):
        quantized(network, pooled("real"), tmp_path / "run", data=other)
    got = quantized(network, pooled("real"), tmp_path / "run", data=data)
    assert same(state(expected.network), state(got.network))


@pytest.mark.usefixtures("after_each_step")
def test_tuned_student_is_written_without_its_optimizer(network: Captured, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, clock=lambda: 0.0)
    registered: list[set[str]] = []
    save = checkpoints.save

    def noted() -> None:
        registered.append(set(checkpoints._parts))
        save()

    checkpoints.save = noted  # type: ignore[method-assign]
    gdfq.quantize(
        network, networks.images(1, shape=SHAPE), "w4a4", pooled("quick"), steps=12,
        checkpoints=checkpoints,
    )  # fmt: skip
    assert "optimizer" in registered[-2]
    assert "optimizer" not in registered[-1]
    assert "student" in registered[-1]
