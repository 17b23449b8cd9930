"""The student that is built from a captured network."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import networks
from support.narrowing import instance
from torch import Tensor, nn

import gdfq
from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.files.states import differences
from gdfq.functional.grid import Bits, Layout
from gdfq.graph.capture import Captured, capture
from gdfq.plan.plan import Plan
from gdfq.plan.resolve import resolve
from gdfq.quantizers.base import ActivationQuantizer
from gdfq.quantizers.family import LSQ
from gdfq.quantizers.minmax import MinMaxWeight
from gdfq.recipes import RECIPES
from gdfq.sources.base import Batch
from gdfq.stages import identity_of
from gdfq.student.build import StudentBatchNorm, build_student
from gdfq.student.placement import activation_bits
from gdfq.student.scheme import Scheme
from gdfq.tuning.base import NO_TUNING
from gdfq.tuning.calibrate import calibrate_


def test_with_features_gives_quantized_values() -> None:
    teacher = networks.captured("Residual")
    student = build_student(teacher, Scheme(Bits(4, 2), "relu"), quantizers=LSQ)
    student.eval()
    for quantizer in student.activations:
        quantizer.observing = True
    student(networks.images(8))
    for quantizer in student.activations:
        quantizer.observing = False
    _, features = student.with_features(["relu", "relu_1"])(networks.images(8))
    assert [len(feature.unique()) <= 4 for feature in features] == [True, True]


def test_with_features_drops_relus_that_the_grid_replaces() -> None:
    teacher = networks.captured("Residual")
    student = build_student(teacher, Scheme(Bits(4, 3), "relu"), quantizers=LSQ).eval()
    batch = Batch((networks.images(8),), None, None)
    calibrate_(student, [batch], steps=1)
    lean = student.with_features(["relu", "relu_1"])

    def answer_and_gradients(ask: Any) -> Any:
        student.zero_grad()
        with torch.enable_grad():
            logits = ask(batch.images)
            logits.square().sum().backward()
        return logits, [p.grad.clone() for p in student.parameters() if p.grad is not None]

    logits, gradients = answer_and_gradients(student)
    lean_logits, lean_gradients = answer_and_gradients(lambda x: lean(x)[0])
    assert torch.equal(logits, lean_logits)
    assert len(gradients) == len(lean_gradients) > 5
    assert all(map(torch.equal, gradients, lean_gradients))

    counted = {"relu": 0}

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            counted["relu"] += "relu" in str(function)
            return function(*args, **(kwargs or {}))

    with Count():
        lean(batch.images)
    assert counted == {"relu": 0}
    # A grid that begins elsewhere does not clamp as a ReLU does.
    first = next(iter(student.activations))
    instance(first.zero_point, Tensor).add_(1)
    with Count():
        student.with_features([])(batch.images)
    assert counted == {"relu": 1}


def test_with_features_keeps_a_relu_with_other_readers() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.first(x).relu()
            return self.second(h), h

    torch.manual_seed(0)
    teacher = capture(Both().eval(), torch.randn(2, 6))
    student = build_student(teacher, Scheme(Bits(4, 2), "relu"), quantizers=LSQ).eval()
    batch = Batch((torch.randn(8, 6, generator=torch.Generator().manual_seed(0)),), None, None)
    calibrate_(student, [batch], steps=1)
    lean, _ = student.with_features([])(batch.images)
    plain = student(batch.images)
    assert all(map(torch.equal, lean, plain))
    assert bool((lean[1] >= 0).all())


def test_channels_use_their_whole_grid() -> None:
    quantized = MinMaxWeight(3, *_rows()).quantized(
        networks.make("Residual").get_parameter("conv1.weight")
    )
    for channel in quantized.codes:
        assert int(channel.min()) == -4
        assert int(channel.max()) == 3


def _rows() -> tuple[Layout, int]:
    from gdfq.functional.grid import Layout

    return (Layout.ROWS, 1)


def test_batch_norm_statistics_are_fixed_by_default(teacher: Captured) -> None:
    for fixed in (True, False):
        student = build_student(teacher, Scheme(Bits(4, 4), "relu"), fixed_statistics=fixed)
        norm = next(m for m in student.modules() if isinstance(m, StudentBatchNorm))
        before = norm.mean.clone()
        for quantizer in student.activations:
            quantizer.observing = True
        student.train()(networks.images(8))
        assert torch.equal(norm.mean, before) == fixed


def test_parameters_train_and_buffers_do_not(teacher: Captured) -> None:
    student = build_student(teacher, Scheme(Bits(4, 4), "relu"))
    names = {name for name, _ in student.named_parameters()}
    assert "network.conv1.weight" in names
    assert "network.student_batch_norm.batch_norm.weight" in names
    for tensor in teacher.network.parameters():
        assert not tensor.requires_grad


def test_network_without_layers_is_refused() -> None:
    smooth = nn.Sequential(nn.Conv2d(3, 5, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    teacher = capture(smooth, networks.images(1))
    with pytest.raises(UsageError, match="Use placement 'full'"):
        build_student(teacher, Scheme(Bits(4, 4), "relu"))
    build_student(teacher, Scheme(Bits(4, 4), "full"))
    empty = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UsageError, match="has none"):
        build_student(capture(empty, networks.images(1)), Scheme(Bits(4, 4), "relu"))


def test_norm_without_affine_parameters_has_none_to_train() -> None:
    student = build_student(networks.captured("Awkward"), Scheme(Bits(4, 4), "relu"))
    (norm,) = (m for m in student.modules() if isinstance(m, StudentBatchNorm))
    assert not list(norm.parameters())
    other = build_student(networks.captured("Residual"), Scheme(Bits(4, 4), "relu"))
    assert all(p.requires_grad for p in other.parameters())


def test_every_form_of_relu_is_recognized() -> None:
    spellings = (
        lambda x: x.clip(0, 6),
        lambda x: x.clamp(min=0),
        lambda x: nn.functional.relu6(x),
        lambda x: nn.functional.hardtanh(x, 0.0, 6.0),
    )

    class Net(nn.Module):
        def __init__(self, relu: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 5, 1), relu

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.conv(x)).mean((2, 3))

    for relu in spellings:
        teacher = capture(Net(relu), networks.images(1))
        assert list(activation_bits(teacher, Scheme(Bits(4, 4), "relu")).values()) == [4]


def test_bias_that_depends_on_the_input_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.conv.weight, x.mean().expand(5)).relu().mean((2, 3))

    teacher = capture(Net(), networks.images(1))
    with pytest.raises(UsageError, match="computed from the input"):
        build_student(teacher, Scheme(Bits(4, 4), "relu"))


_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _input_grid(**options: Any) -> tuple[float, float]:
    """Return the lowest and the highest number of the grid of the input, 8 bits."""
    recipe = replace(RECIPES["quick"], tuning=NO_TUNING)
    network = gdfq.quantize(
        networks.make("Residual"), networks.images(1), "w4a4", recipe, steps=2, **options
    ).network
    return network.activations[0].ends


@pytest.mark.parametrize(
    ("bits", "reach"), [(Bits(8, 8), 1.2), (Bits(4, 8), 1.0), (Bits(4, 4), 1.0)]
)
def test_grids_reach_beyond_the_images_where_everything_has_8_bits(
    bits: Bits, reach: float, teacher: Captured
) -> None:
    student = build_student(teacher, Scheme(bits, "full"), quantizers=LSQ)
    found = [m.reach for m in student.modules() if isinstance(m, ActivationQuantizer)]
    assert {*found} == {reach}


def test_input_grid_covers_the_pixels_where_mean_and_std_are_given() -> None:
    # 0.485/0.229 = 2.118 below and (1 − 0.406)/0.225 = 2.64 above; a code of 0 lies between.
    expected = -0.485 / 0.229, (1 - 0.406) / 0.225
    step = (expected[1] - expected[0]) / 255
    low, high = _input_grid(mean=_MEAN, std=_STD)
    assert high - low == pytest.approx(255 * step, rel=1e-5)
    assert low == pytest.approx(expected[0], abs=step / 2)
    assert low / step == pytest.approx(round(low / step), abs=1e-3)


def test_input_grid_is_found_from_images_where_pixels_are_unknown() -> None:
    covered = _input_grid(mean=_MEAN, std=_STD)
    width = covered[1] - covered[0]
    for options in ({}, {"mean": _MEAN}, {"std": _STD}):
        low, high = _input_grid(**options)
        assert high - low != pytest.approx(width, rel=1e-2)


def test_images_beyond_the_pixels_lift_the_limits() -> None:
    def planned(scale: float) -> Plan:
        images = networks.images(8).clamp(-1, 1) * scale
        return resolve(
            networks.make("Residual"),
            networks.images(1),
            "w4a4",
            "quick",
            mean=_MEAN,
            std=_STD,
            test=(images, torch.zeros(8, dtype=torch.long)),
        )

    beyond, within = planned(5.0), planned(1.0)
    assert beyond.teacher.input_limits is None
    expected = [(-m / s, (1 - m) / s) for m, s in zip(_MEAN, _STD, strict=True)]
    assert within.teacher.input_limits == tuple(expected)
    changed = differences(identity_of(beyond, Context()), identity_of(within, Context()))
    assert list(changed) == ["input_limits"]  # a checkpoint of the one is refused by the other
