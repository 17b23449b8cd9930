"""Recorded steps and whole runs on a GPU. What only a real one shows is skipped without one."""

import warnings
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import networks
from support.simulated_gpu import GPU, simulated_gpu
from torch import Tensor, nn

import gdfq
from gdfq.analysis.accuracy_drop import measure_expected_drop
from gdfq.errors import GdfqWarning
from gdfq.execution.context import Context
from gdfq.execution.precision import in_full_float32
from gdfq.execution.progress import silent
from gdfq.execution.replay import Replayed
from gdfq.pipeline import make_images
from gdfq.recipes import find_recipe

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def steps_of(device: str, *, replays: bool) -> list[Tensor]:
    """Losses and gradients of inputs of six updates of a small network."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    draw = torch.Generator().manual_seed(1)

    def loss_of(x: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
        y = layer(x).square()
        return {"loss": (y if weights is None else y * weights).sum(), "y": y.detach()}

    call = Replayed(loss_of, layer.parameters()) if replays else loss_of

    def update_(step: int) -> list[Tensor]:
        x = torch.randn(5, 4, generator=draw).to(device).requires_grad_()
        weights = torch.rand(5, 3, generator=draw).to(device) if step % 2 else None
        optimizer.zero_grad()
        made = call(x, weights)
        made["loss"].backward()
        optimizer.step()
        assert x.grad is not None
        assert not made["y"].requires_grad
        return [made["loss"].detach(), made["y"], x.grad.clone()]

    found = [tensor for step in range(6) for tensor in update_(step)]
    return [tensor.cpu() for tensor in found]


@on_gpu
def test_replays_compute_what_the_function_does() -> None:
    expected = steps_of("cuda", replays=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GdfqWarning)
        found = steps_of("cuda", replays=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_function_that_cannot_be_recorded_is_computed_as_it_is() -> None:
    def reads(x: Tensor) -> Tensor:
        return x * float(x.sum())

    with simulated_gpu():
        call = Replayed(reads)
        x = torch.ones(2, device=GPU)
        call(x)
        with pytest.warns(GdfqWarning, match="launched one by one"):
            second = call(x)
        assert second.tolist() == [2, 2]
        assert call(x).tolist() == [2, 2]


def test_function_is_recorded_once_for_inputs_of_some_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = []

    def record(call: nn.Module, samples: tuple[Tensor, ...], **_: object) -> nn.Module:
        recorded.append([tuple(x.shape) for x in samples])
        call(*samples)
        return call

    with simulated_gpu():
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
        call = Replayed(lambda x: 2 * x)
        for size in (2, 2, 2, 3, 2, 3):
            assert call(torch.ones(size, device=GPU)).tolist() == [2] * size
    assert recorded == [[(2,)], [(3,)]]


def test_cpu_computes_the_function_as_it_is() -> None:
    for a, b in zip(steps_of("cpu", replays=True), steps_of("cpu", replays=False), strict=True):
        assert a.tolist() == b.tolist()


@on_gpu
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("quick", {"images": 64, "iterations": 20, "steps": 12}),
        ("patches", {"images": 64, "iterations": 20, "steps": 12}),
        ("paper", {"steps": 30}),
    ],
)
@pytest.mark.filterwarnings("error::gdfq.errors.GdfqWarning")
def test_recipes_run_on_a_gpu(recipe: str, options: dict[str, Any]) -> None:
    half = (0.5, 0.5, 0.5)
    results = [
        gdfq.quantize(
            networks.make("Residual"),
            torch.zeros(1, *networks.SHAPE),
            bits="w3a3",
            recipe=recipe,
            mean=half,
            std=half,
            device=device,
            **options,
        )
        for device in ("cuda", "cpu")
    ]
    x = networks.images(64)
    found, expected = (result.network.cpu()(x) for result in results)
    assert torch.nn.functional.cosine_similarity(found, expected).mean() > 0.9


def rounds() -> tuple[bool, bool]:
    """Whether a GPU may round factors of convolutions, and of products of matrices."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return cudnn.conv.fp32_precision == "tf32", matmul.fp32_precision == "tf32"  # type: ignore[attr-defined]


def test_no_thread_rounds_factors_while_another_needs_float32() -> None:
    """The setting of the process comes back with the last of them."""
    before, gpu = rounds(), torch.device("cuda")
    assert before == (True, False)  # PyTorch's defaults
    first, second = in_full_float32(gpu), in_full_float32(gpu)
    first.__enter__()
    second.__enter__()
    assert rounds() == (False, False)
    first.__exit__(None, None, None)
    assert rounds() == (False, False)
    second.__exit__(None, None, None)
    assert rounds() == before


def test_setting_of_the_newer_kind_is_kept() -> None:
    """PyTorch has two ways to say it, and refuses to read a mixture."""
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    matmul: Any = torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    try:
        conv.fp32_precision = "ieee"
        matmul.fp32_precision = "tf32"
        with in_full_float32(torch.device("cuda")):
            assert rounds() == (False, False)
        assert (conv.fp32_precision, matmul.fp32_precision) == ("ieee", "tf32")
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


def test_nothing_is_set_for_a_cpu() -> None:
    before = rounds()
    with in_full_float32(torch.device("cpu")):
        assert rounds() == before


@pytest.mark.parametrize("what", ["run", "student", "images", "drop"])
def test_products_in_float32_have_unrounded_factors_on_a_gpu(what: str) -> None:
    seen: list[tuple[bool, bool]] = []

    def hears(*_: object) -> None:
        seen.append(rounds())

    recipe = find_recipe("zeroq")
    recipe = replace(recipe, source=replace(recipe.source, batch=4, iterations=2))  # type: ignore[type-var]
    with simulated_gpu():
        teacher = deepcopy(networks.captured("Residual")).to(GPU)
        if what == "images":
            make_images(teacher, recipe, 4, Context(listener=hears))
        else:
            student = gdfq.quantize(
                teacher, bits="w4a4", recipe=recipe, listener=hears if what == "run" else silent
            )
        if what == "student":
            student.network.integer_form.register_forward_hook(hears)
            student.network(networks.images(2).to(GPU))
        if what == "drop":
            measure_expected_drop(teacher, student.network, seed=0, listener=hears)
    assert seen
    assert all(found == (False, False) for found in seen)
