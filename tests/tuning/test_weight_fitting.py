"""Weights of a student's layers, fitted to the teacher's outputs and rounded."""

from typing import Any

import pytest
import torch
from support.students import noise, student_of
from torch import Tensor, nn

from gdfq.execution.context import Context
from gdfq.execution.progress import Step
from gdfq.functional.grid import Layout
from gdfq.functional.rounding import fitted_weight
from gdfq.graph import queries
from gdfq.graph.capture import Captured, capture
from gdfq.quantizers.lsq import LearnedWeight
from gdfq.tuning import weight_fitting
from gdfq.tuning.moment_matching import match_moments_
from gdfq.tuning.weight_fitting import can_be_fitted, fit_weight_


def only_layer(module: nn.Module, x: Tensor) -> tuple[Any, Captured]:
    teacher = capture(nn.Sequential(module).eval(), x[:2])
    (layer,) = queries.layers_of(teacher.network)
    return layer, teacher


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "pointwise": (nn.Conv2d(6, 4, 1), (6, 9, 7)),
    "plain": (nn.Conv2d(3, 4, 3, padding=1), (3, 9, 7)),
    "strided": (nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 0)), (3, 9, 8)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=(2, 1), padding=2, groups=2), (4, 9, 7)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (4, 9, 7)),
    "same": (nn.Conv2d(3, 4, (5, 3), padding="same", dilation=(1, 2)), (3, 9, 7)),
    "valid": (nn.Conv2d(3, 4, 3, padding="valid"), (3, 9, 7)),
    "signal": (nn.Conv1d(3, 4, 5, stride=2), (3, 30)),
    "volume": (nn.Conv3d(2, 3, 2, padding=1), (2, 5, 4, 3)),
    "vector": (nn.Linear(7, 5), (7,)),
    "tokens": (nn.Linear(7, 5), (11, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("sizes", [(20,), (8, 8, 4)])
def test_sampled_inputs_times_the_weight_are_the_sampled_outputs(
    name: str, sizes: tuple[int, ...]
) -> None:
    most = 150  # fewer than there are positions
    module, shape = LAYERS[name]
    x = torch.randn(20, *shape)
    layer, teacher = only_layer(module, x)
    groups = queries.group_count(layer)
    weight, bias = (module.get_parameter(name).detach() for name in ("weight", "bias"))
    inputs, outputs = x.split(list(sizes)), teacher.network(x).detach().split(list(sizes))
    samples = weight_fitting._input_samples(layer, weight.shape[2:], inputs, groups, most)
    targets = weight_fitting._output_samples(layer, outputs, most)
    assert 20 <= len(samples) == len(targets) <= 300
    rows = weight.reshape(groups, -1, samples.shape[2])
    found = torch.einsum("pgk,grk->pgr", samples, rows).flatten(1)
    torch.testing.assert_close(found + bias, targets, rtol=1e-4, atol=1e-5)


def test_weight_whose_inputs_shrank_grows() -> None:
    """Inputs of half the size need twice the weight; the ridge and the unexplained part hold back."""
    torch.manual_seed(0)
    x = torch.randn(500, 6)
    module = nn.Linear(6, 3)
    layer, teacher = only_layer(module, x)
    targets = [teacher.network(x).detach()]
    all_of_it, none_of_it = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    fitted, rounded = (LearnedWeight(module.weight, 8, Layout.ROWS) for _ in range(2))
    fit_weight_(fitted, layer, module.weight, [0.9 * x], targets, all_of_it)
    fit_weight_(rounded, layer, module.weight, [0.9 * x], targets, none_of_it)
    weight = module.weight.detach()
    torch.testing.assert_close(rounded(weight), weight, rtol=0, atol=0.02)
    # (0.9 + 0.3·0.81) / (0.81 + 0.3·0.81) = 1.0855, of which 99 % are taken.
    ratio = float((fitted(weight).detach() * weight).sum() / weight.square().sum())
    assert ratio == pytest.approx(1 + 0.99 * 0.0855, abs=0.01)


@pytest.mark.parametrize(
    ("samples", "noise_of_targets", "expected"), [(400, 0.0, 0.3), (20, 10.0, 10.0), (1, 0.0, 10.0)]
)
def test_ridge_is_as_large_as_unseen_outputs_want(
    samples: int, noise_of_targets: float, expected: float
) -> None:
    """With few noisy outputs the old weight predicts others best; with many exact ones the new."""
    draw = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 1, 5, 16, generator=draw, dtype=torch.double)
    x = torch.randn(1, samples, 16, generator=draw)
    y = x @ (new if noise_of_targets == 0 else old).mT.float()
    y += noise_of_targets * torch.randn(y.shape, generator=draw)
    assert weight_fitting._moments_and_ridge(old, x, y)[1] == expected


def test_ridge_of_many_columns_is_found_in_the_span_of_the_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The choice is that of the whole problem, whose systems would have a row for each column."""
    sizes, choices = set(), set()

    def recorded(weight: Tensor, inputs: Tensor, *others: Tensor) -> Tensor:
        sizes.add(inputs.shape[-1])
        return fitted_weight(weight, inputs, *others)

    monkeypatch.setattr(weight_fitting, "fitted_weight", recorded)
    for seed in range(12):
        draw = torch.Generator().manual_seed(seed)
        old, change = torch.randn(2, 2, 5, 40, generator=draw, dtype=torch.double)
        x = torch.randn(2, 12, 40, generator=draw) * (torch.arange(40) % 5 + 1) / 3
        y = x @ (old + 2.0 ** (-seed / 2) * change).mT.float()
        y += 2.0 ** (seed / 2) * torch.randn(y.shape, generator=draw)
        _, found = weight_fitting._moments_and_ridge(old, x, y)
        errors = [_error_of_unseen_halves(old, x, y, share) for share in (0.3, 1.0, 3.0, 10.0)]
        assert found == (0.3, 1.0, 3.0, 10.0)[errors.index(min(errors))]
        choices.add(found)
    assert len(choices) > 2
    assert sizes == {12}


def test_what_a_weight_misses_is_exact_beside_large_inputs() -> None:
    """Inputs with a common factor of 1,000 that the weight ignores, as outliers in transformers."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 5, 8, generator=draw, dtype=torch.double)
    weight -= weight.mean(2, keepdim=True)
    x = torch.randn(1, 400, 8, generator=draw) + 1000 * torch.randn(1, 400, 1, generator=draw)
    y = x @ weight.float().mT + 0.05 * torch.randn(1, 400, 5, generator=draw)
    seen = weight_fitting._SecondMoments.of(weight, x, y)
    missed = (y - x @ weight.float().mT).double().square().mean(1)
    wanted = missed / y.double().square().mean(1)
    torch.testing.assert_close(seen.unexplained(weight), wanted, rtol=1e-4, atol=0)
    assert float(wanted.max()) < 0.05


def test_errors_of_other_weights_follow_from_the_moments() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, other = torch.randn(2, 2, 5, 8, generator=draw, dtype=torch.double)
    x, noise = torch.randn(2, 400, 8, generator=draw), torch.randn(2, 400, 5, generator=draw)
    y = x @ weight.float().mT + noise
    halves = [weight_fitting._SecondMoments.of(weight, x[:, p], y[:, p]) for p in PARTS]
    seen = halves[0].joined(halves[1])
    missed = (y - x @ other.float().mT).double().square().mean(1)
    wanted = missed / y.double().square().mean(1)
    torch.testing.assert_close(seen.unexplained(other), wanted, rtol=1e-4, atol=0)


PARTS = (slice(100), slice(100, None))


def _error_of_unseen_halves(old: Tensor, x: Tensor, y: Tensor, share: float) -> float:
    """Return the mean unexplained part of the half that a ridge regression did not see."""
    x, y, found = x.double(), y.double(), 0.0
    for known, unseen in ((slice(6), slice(6, None)), (slice(6, None), slice(6))):
        covariance = x[:, known].mT @ x[:, known] / 6
        cross = y[:, known].mT @ x[:, known] / 6
        ridge = share * x[:, known].square().mean((1, 2))
        missed = y[:, unseen] - x[:, unseen] @ fitted_weight(old, covariance, cross, ridge).mT
        ratio = missed.square().mean(1) / y[:, unseen].square().mean(1)
        found += float(ratio.clamp_max(1).mean())
    return found


def test_fitting_brings_a_student_nearer_to_its_teacher(teacher: Captured) -> None:
    smooth = nn.AvgPool2d(3, stride=1, padding=1)  # inputs that are correlated
    images, others = smooth(noise()), smooth(torch.randn_like(noise()))
    wanted = teacher.network(others)
    errors = []
    for fit_weights in (False, True):
        student = student_of(teacher, images)
        match_moments_(student, teacher, (images,), fit_weights=fit_weights)
        errors.append(float((student(others) - wanted).detach().norm()))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize(("fit_weights", "stage"), [(True, "fit"), (False, "match")])
def test_listener_hears_of_each_layer(teacher: Captured, fit_weights: bool, stage: str) -> None:
    images = noise()
    heard: list[Step] = []
    student = student_of(teacher, images)
    context = Context(listener=heard.append)
    match_moments_(student, teacher, (images,), context, fit_weights=fit_weights)
    layers = len(queries.weighted_layers(teacher.network))
    assert [(step.stage, step.index, step.total) for step in heard] == [
        (stage, index, layers) for index in range(1, layers + 1)
    ]


def test_transposed_convolutions_are_not_fitted() -> None:
    x = torch.randn(4, 3, 5, 5)
    module = nn.ConvTranspose2d(3, 4, 3)
    layer, _ = only_layer(module, x)
    quantizer = LearnedWeight(module.weight, 4, *queries.weight_layout(layer))
    assert not can_be_fitted(layer, quantizer, module.weight)


@pytest.mark.parametrize(("inputs", "is_fitted"), [(8192, True), (8193, False)])
def test_layers_with_very_many_inputs_are_not_fitted(inputs: int, is_fitted: bool) -> None:
    module = nn.Linear(inputs, 2)
    layer, _ = only_layer(module, torch.randn(4, inputs))
    quantizer = LearnedWeight(module.weight, 4, Layout.ROWS)
    assert can_be_fitted(layer, quantizer, module.weight) is is_fitted
