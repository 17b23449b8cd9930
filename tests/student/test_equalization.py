"""Channel equalization: the same function with channels of similar scale."""

import math

import pytest
import torch
from support import networks
from support.choice import every_second
from support.narrowing import present
from torch import Tensor, nn

from gdfq.functional.grid import Bits
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.capture import Captured, capture
from gdfq.graph.tensors import tensors_of
from gdfq.quantizers.family import LSQ
from gdfq.quantizers.lsq import best_range
from gdfq.sources.base import Batch
from gdfq.student.build import build_student
from gdfq.student.equalization import activation_noise_share, channel_scales, rescaled
from gdfq.student.scheme import LayerBits, Scheme
from gdfq.tuning.calibrate import calibrate_

T1 = Scheme(Bits(4, 4), "relu")


FULL = Scheme(Bits(4, 4), "full")


def equalize(teacher: Captured, scheme: Scheme, images: Tensor) -> Captured:
    return rescaled(teacher, channel_scales(teacher, scheme, images))


def changed(teacher: Captured, equalized: Captured) -> set[str]:
    """The tensors that are not those of the folded teacher."""
    before, after = tensors_of(fold_batch_norms(teacher).network), tensors_of(equalized.network)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("name", every_second([*networks.NETWORKS, *networks.TASKS, "Transformer"]))
def test_equalization_keeps_the_function(name: str) -> None:
    shape = networks.shape_of(name)
    teacher = capture(networks.make(name), networks.images(2, shape=shape))
    images = networks.images(8, seed=2, shape=shape)
    for scheme in (T1, FULL):
        equalized = equalize(teacher, scheme, networks.images(16, seed=1, shape=shape))
        expected, actual = teacher.network(images), equalized.network(images)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        if name in {"Residual", "Branches"}:
            assert changed(teacher, equalized)


class Chain(nn.Module):
    """Two channels, the second four times the first, with an operator between two layers."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 1)
        self.between = between
        self.depthwise = nn.Conv2d(2, 2, 3, padding=1, groups=2)
        self.last = nn.Conv2d(2, 3, 1)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([1.0, 4.0]).view(2, 1, 1, 1))
            present(self.first.bias).copy_(torch.tensor([0.25, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.depthwise(self.between(self.first(x).relu()))).mean((2, 3))


def test_channel_factors_are_roots_of_their_scales() -> None:
    """The second channel's best scale is four times the first's, so its factor is twice as large."""
    teacher = capture(Chain(nn.Identity()).eval(), networks.images(2, shape=(1, 8, 8)))
    images = networks.images(16, seed=1, shape=(1, 8, 8))
    equalized = equalize(teacher, T1, images)
    before, after = tensors_of(teacher.network), tensors_of(equalized.network)
    scale = (before["first.weight"] / after["first.weight"]).flatten()
    assert float(scale[1] / scale[0]) == pytest.approx(2, rel=1e-5)
    activation = (before["first.weight"].view(1, 2, 1, 1) * images).add(
        before["first.bias"].view(1, 2, 1, 1)
    )
    steps = [best_range(x.relu(), 4)[0] for x in (activation[:, 1], activation)]
    assert float(scale[1]) == pytest.approx(math.sqrt(steps[0] / steps[1]), rel=0.03)
    torch.testing.assert_close(after["first.bias"], before["first.bias"] / scale)
    # A depthwise layer takes each factor back from its own channel; the last is as it was.
    torch.testing.assert_close(
        after["depthwise.weight"], before["depthwise.weight"] * scale.view(2, 1, 1, 1)
    )
    assert changed(teacher, equalized) == {"first.weight", "first.bias", "depthwise.weight"}


@pytest.mark.parametrize(
    ("bits", "readers", "share"),
    [
        *((4, [4], 1 / 2), (8, [8], 1 / 2), (4, [3], 1 / 5), (8, [4, 4, 4], 1 / 257)),
        # Several layers: the mean of 1 and 256; a weight that stays float has no noise.
        *((8, [8, 4], 2 / 259), (4, [4, None], 2 / 3), (8, [None], 1), (8, [], 1)),
    ],
)
def test_activation_noise_share_is_that_of_the_noise_power(
    bits: int, readers: list[int | None], share: float
) -> None:
    assert activation_noise_share(bits, readers) == pytest.approx(share)


def test_wide_activations_leave_narrow_weights_as_they_are() -> None:
    teacher = capture(Chain(nn.Identity()).eval(), networks.images(2, shape=(1, 8, 8)))
    images = networks.images(16, seed=1, shape=(1, 8, 8))
    narrow, wide = (
        next(iter(channel_scales(teacher, Scheme(Bits(4, bits), "full"), images).values()))
        for bits in (4, 8)
    )
    assert float(narrow[1] / narrow[0]) > 1.9
    torch.testing.assert_close(wide, torch.ones(2), rtol=0.01, atol=0)


def test_channel_factors_follow_the_bits_of_the_layer_that_reads_them() -> None:
    """A depthwise layer of 8 bits behind activations of 8 bits takes the factors of equal bits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Chain(nn.Identity()).eval()
    teacher = capture(network, networks.images(2, shape=(1, 8, 8)))
    images = networks.images(16, seed=1, shape=(1, 8, 8))

    def factors(scheme: Scheme) -> dict[str, float]:
        scales = channel_scales(teacher, scheme, images)
        return {name: float(scale.amax() / scale.amin()) for name, scale in scales.items()}

    wide, narrow = (factors(Scheme(Bits(bits, 8), "full")) for bits in (8, 4))
    assert min(wide.values()) > 1.9
    assert max(narrow.values()) < 1.02
    for own, expected in ((8, wide), (4, narrow)):
        assert factors(Scheme(Bits(12 - own, 8), "full", (LayerBits("*", own),))) == expected
    found = factors(Scheme(Bits(4, 8), "full", (LayerBits("depthwise", 8),)))
    assert found == wide | {"conv2d_1": narrow["conv2d_1"]}  # which the last layer reads


class Offset(nn.Module):
    """Adds a constant to each channel, so factors cannot pass."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor([1.0, 2.0]).view(2, 1, 1).expand(2, 8, 8).clone())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


@pytest.mark.parametrize(
    "between",
    [
        *(nn.ReLU6(), nn.Hardswish(), nn.AdaptiveMaxPool2d(4, return_indices=True), nn.Sigmoid()),
        *(Offset(), nn.InstanceNorm2d(2), nn.Softmax(1), nn.ConstantPad3d((0, 0, 0, 0, 1, -1), 0)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_channels_stay_where_factors_cannot_pass(between: nn.Module) -> None:
    if isinstance(between, nn.AdaptiveMaxPool2d):
        between = First(between)
    teacher = capture(Chain(between).eval(), networks.images(2, shape=(1, 8, 8)))
    equalized = equalize(teacher, T1, networks.images(16, seed=1, shape=(1, 8, 8)))
    assert not changed(teacher, equalized)


class First(nn.Module):
    """The first of several outputs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)[0]


@pytest.mark.parametrize(
    "between",
    [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.ZeroPad2d(1), nn.Dropout(0.5)],
    ids=lambda module: type(module).__name__,
)
def test_factors_pass_positively_homogeneous_operators(between: nn.Module) -> None:
    teacher = capture(Chain(between).eval(), networks.images(2, shape=(1, 8, 8)))
    equalized = equalize(teacher, T1, networks.images(16, seed=1, shape=(1, 8, 8)))
    assert changed(teacher, equalized) == {"first.weight", "first.bias", "depthwise.weight"}
    images = networks.images(8, seed=2, shape=(1, 8, 8))
    torch.testing.assert_close(equalized.network(images), teacher.network(images))


class ChannelMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)


def unlike(*modules: nn.Module) -> nn.Sequential:
    """A network whose first layer has channels of scales from 1/3 to 3, and random biases."""
    torch.manual_seed(0)
    first = modules[0]
    with torch.no_grad():
        weight, bias = first.get_parameter("weight"), first.get_parameter("bias")
        factors = torch.logspace(-0.5, 0.5, len(bias))
        weight.normal_().mul_(factors.view(-1, *[1] * (weight.ndim - 1)))
        bias.normal_().mul_(factors)
    return nn.Sequential(*modules).eval()


def convolution(channels: int = 8) -> nn.Conv2d:
    return nn.Conv2d(3, channels, 3, padding=1)


@pytest.mark.parametrize(
    ("modules", "shape", "scaled"),
    [
        ((nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), (6,), True),
        ((nn.Linear(6, 9), nn.ReLU(), nn.AvgPool1d(3, 1, 1), nn.Linear(9, 4)), (6,), False),
        ((nn.Linear(6, 9), nn.ReLU(), nn.MaxPool1d(3), nn.Linear(3, 4)), (6,), False),
        ((convolution(), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=4)), (3, 8, 8), True),
        ((convolution(), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, groups=2)), (3, 8, 8), True),
        ((convolution(), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)), (3, 8, 8), False),
        ((convolution(), nn.ReLU(), ChannelMean(), nn.Conv2d(1, 4, 1)), (3, 8, 8), False),
        (
            (convolution(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
            (3, 8, 8),
            True,
        ),
    ],
    ids=["linear", "average", "greatest", "groups", "transposed", "flat", "mean", "pooled"],
)
def test_factors_pass_only_operators_that_keep_channels(
    modules: tuple[nn.Module, ...], shape: tuple[int, ...], scaled: bool
) -> None:
    teacher = capture(unlike(*modules), networks.images(2, shape=shape))
    equalized = equalize(teacher, T1, networks.images(16, seed=1, shape=shape))
    assert bool(changed(teacher, equalized)) == scaled
    images = networks.images(8, seed=2, shape=shape)
    torch.testing.assert_close(
        equalized.network(images), teacher.network(images), rtol=1e-4, atol=1e-4
    )


def test_weight_that_is_used_twice_stays_one() -> None:
    teacher = networks.captured("Shared")
    equalized = equalize(teacher, T1, networks.images(16, seed=1))
    assert not {name for name in changed(teacher, equalized) if name.startswith("conv.weight")}


def test_weight_that_is_read_elsewhere_is_unchanged() -> None:
    class Told(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.depthwise.weight.square().sum()

    teacher = capture(Told(nn.Identity()).eval(), networks.images(2, shape=(1, 8, 8)))
    equalized = equalize(teacher, T1, networks.images(16, seed=1, shape=(1, 8, 8)))
    images = networks.images(8, seed=2, shape=(1, 8, 8))
    torch.testing.assert_close(equalized.network(images), teacher.network(images))


@pytest.mark.parametrize(("weight", "bias", "scale"), [(1.0, -100.0, 1), (1e-6, 0.0, 1 / 8)])
def test_dead_channels_stay_and_factors_are_bounded(
    weight: float, bias: float, scale: float
) -> None:
    chain = Chain(nn.Identity())
    with torch.no_grad():
        chain.first.weight.copy_(torch.tensor([weight, 1.0]).view(2, 1, 1, 1))
        present(chain.first.bias).copy_(torch.tensor([bias, 0.0]))
    teacher = capture(chain.eval(), networks.images(2, shape=(1, 8, 8)))
    scales = channel_scales(teacher, T1, networks.images(16, seed=1, shape=(1, 8, 8)))
    assert float(scales["relu"][0]) == pytest.approx(scale, rel=1e-5)


def test_equalization_reduces_the_error_of_unequal_channels() -> None:
    """Channels have scales from 1/30 to 30; the error at 4 bits falls."""
    unlike, images = torch.logspace(-1.5, 1.5, 8), networks.images(64, seed=1)

    @torch.no_grad()
    def error(teacher: Captured, expected: Tensor) -> float:
        student = build_student(teacher, T1, quantizers=LSQ)
        calibrate_(student, [Batch((images,), None, None)], steps=1)
        return float((student(images) - expected).square().mean() / expected.square().mean())

    ratios = []
    for seed in range(9):
        torch.manual_seed(seed)
        network = nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
        ).eval()
        with torch.no_grad():
            network.get_parameter("0.weight").normal_().mul_(unlike.view(-1, 1, 1, 1))
            network.get_parameter("0.bias").mul_(unlike)
            network.get_parameter("2.weight").normal_().div_(unlike.view(1, -1, 1, 1))
            expected = network(images)
        teacher = capture(network, images[:2])
        ratios.append(error(equalize(teacher, T1, images), expected) / error(teacher, expected))
    assert sorted(ratios)[4] < 0.6
