"""Architectures of the libraries pass the whole method, with random weights.

They need the extra `hubs`; those of a library that is absent are skipped. `benchmarks.zoo` has all.
"""

import warnings
from typing import Any

import pytest
from support import architectures, torchvision_shim

_OPERATORS = torchvision_shim.define_missing_operators()  # they are there while this lives

NETWORKS = (
    *("ptcv:resnet20_cifar10", "ptcv:preresnet20_cifar10", "ptcv:seresnet20_cifar10"),
    "ptcv:densenet40_k12_cifar10",
    *("timm:test_byobnet", "timm:test_convnext", "timm:test_efficientnet", "timm:test_vit"),
    *("timm:mobilenetv3_small_050", "timm:ghostnet_050"),
    *("torchvision:shufflenet_v2_x0_5", "torchvision:mnasnet0_5", "torchvision:squeezenet1_1"),
)
PACKAGES = {"ptcv": ["pytorchcv"], "timm": ["timm", "torchvision"], "torchvision": ["torchvision"]}


def marked(name: str) -> Any:
    packages = PACKAGES[name.partition(":")[0]]
    return pytest.param(name, marks=[pytest.mark.needs(package) for package in packages])


@pytest.mark.parametrize("name", list(map(marked, NETWORKS)))
def test_architecture_passes_the_whole_method(name: str) -> None:
    (entry,) = (entry for entry in architectures.ENTRIES if entry.spec == name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        row = architectures.passed(entry)
    assert row["full"]["typical_error"] < 1e-3
    # Networks without ReLUs have nothing that relu would quantize, and are told so.
    assert row["relu"].get("typical_error", 0) < 0.1
    assert "Use placement 'full'" in row["relu"].get("error", "Use placement 'full'")
