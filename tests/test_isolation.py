"""Calls of the library leave the process unchanged and do not influence one another."""

import logging
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import networks
from support.choice import checked
from support.small_runs import same, small, state
from torch import Tensor, nn

import gdfq
from gdfq import RECIPES
from gdfq.errors import UsageError
from gdfq.graph.capture import capture
from gdfq.quantized import QuantizedNetwork


def surroundings() -> dict[str, Any]:
    """The state of the process that a call must not change."""
    names = ["", "torch", "torch.onnx", "torch.export", *logging.root.manager.loggerDict]
    loggers = {name: logging.getLogger(name) for name in names}
    return {
        "random": torch.random.get_rng_state().tolist(),
        "type": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "filters": list(warnings.filters),
        "shown by": warnings.showwarning,
        "loggers": {
            name: (logger.level, logger.disabled, list(logger.handlers))
            for name, logger in loggers.items()
        },
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[Any]:
    known = before["loggers"]
    after = {**after, "loggers": {name: after["loggers"][name] for name in known}}
    return [name for name in before if before[name] != after[name]]


@pytest.mark.parametrize("name", ["quick", checked("paper"), checked("genie")])
@pytest.mark.parametrize("grad", [True, False])
def test_quantize_leaves_the_state_of_the_process_unchanged(
    name: str, grad: bool, residual: nn.Module, tmp_path: Path
) -> None:
    capture(residual, networks.images(1))  # what torch sets when it first traces is torch's own
    with torch.set_grad_enabled(grad):
        before = surroundings()
        result = gdfq.quantize(
            residual, networks.images(1), "w4a4", small(RECIPES[name]), steps=5,
            checkpoints=tmp_path,
        )  # fmt: skip
        result.save(tmp_path / "saved")
        gdfq.load(tmp_path / "saved")
        assert changed(before, surroundings()) == []


@pytest.mark.parametrize(
    "mode",
    [torch.inference_mode, partial(torch.autocast, "cpu"), partial(torch.device, "meta")],
    ids=["inference mode", "autocast", "default device"],
)
def test_modes_of_the_caller_change_no_result(
    mode: Callable[[], AbstractContextManager[Any]], residual: nn.Module, tmp_path: Path
) -> None:
    example = networks.images(1)

    def found(folder: Path) -> tuple[dict[str, Tensor], Tensor, bytes]:
        small_fast = small(RECIPES["fast"])
        result = gdfq.quantize(residual, example, "w4a4", small_fast, steps=5)
        result.save(folder)
        exported = gdfq.load(folder).export(folder / "student.onnx")
        images, _ = gdfq.generate(residual, example, 4, small_fast)
        return state(result.network), images, exported.path.read_bytes()

    states, images, file = found(tmp_path / "outside")
    with mode():
        states_within, images_within, file_within = found(tmp_path / "within")
    assert same(states, states_within)
    assert torch.equal(images, images_within)
    assert not images_within.is_inference()
    assert file == file_within


def test_network_made_in_inference_mode_is_quantized() -> None:
    with torch.inference_mode():
        network = networks.make("Residual")
    gdfq.quantize(network, networks.images(1), "w4a4", small(RECIPES["fast"]), steps=5)


def test_another_default_dtype_is_refused_with_what_to_do(residual: nn.Module) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(
            UsageError, match=r"it is torch\.float64\. Call torch\.set_default_dtype"
        ):
            gdfq.capture(residual, torch.zeros(1, 3, 8, 8))
    finally:
        torch.set_default_dtype(torch.float32)


def test_quantize_and_export_show_no_foreign_warnings(residual: nn.Module, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        result = gdfq.quantize(
            residual, networks.images(1), "w4a4", small(RECIPES["quick"]), steps=5
        )
        result.export(tmp_path / "student.onnx")
        result.export(tmp_path / "student.pt2")
    assert [str(warning.message) for warning in heard] == []


def test_two_threads_give_the_results_of_one(residual: nn.Module) -> None:
    """Both capture, tune and freeze at the same time."""
    names = ("quick", "paper")
    jobs = {name: small(RECIPES[name]) for name in names}

    def quantized(name: str) -> QuantizedNetwork:
        return gdfq.quantize(residual, networks.images(1), "w4a4", jobs[name], steps=8)

    alone = {name: quantized(name) for name in names}
    together, errors = {}, []
    meeting = threading.Barrier(len(names))

    def work(name: str) -> None:
        meeting.wait()
        try:
            together[name] = quantized(name)
        except BaseException as error:
            errors.append(error)

    filters = list(warnings.filters)
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert warnings.filters == filters
    for name in names:
        assert same(state(alone[name].network), state(together[name].network))
