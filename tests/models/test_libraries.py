"""A dozen networks of the libraries through the whole line, as `benchmarks/zoo.py` does it.

They need the extra `hubs`; those of a library that is absent are skipped.
"""

import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
from support import torchvision_shim

_OPERATORS = torchvision_shim.define_missing_operators()  # they are there while this lives

ZOO = Path(__file__).resolve().parents[2] / "benchmarks" / "zoo.py"
NETWORKS = (
    *("ptcv:resnet20_cifar10", "ptcv:preresnet20_cifar10", "ptcv:seresnet20_cifar10"),
    *("timm:test_byobnet", "timm:test_convnext", "timm:test_efficientnet", "timm:test_vit"),
    *("timm:mobilenetv3_small_050", "timm:ghostnet_050"),
    *("torchvision:shufflenet_v2_x0_5", "torchvision:mnasnet0_5", "torchvision:squeezenet1_1"),
)
PACKAGES = {"ptcv": ["pytorchcv"], "timm": ["timm", "torchvision"], "torchvision": ["torchvision"]}


@pytest.fixture(scope="module")
def zoo():
    spec = importlib.util.spec_from_file_location("zoo", ZOO)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def marked(name):
    packages = PACKAGES[name.partition(":")[0]]
    return pytest.param(name, marks=[pytest.mark.needs(package) for package in packages])


@pytest.mark.parametrize("name", list(map(marked, NETWORKS)))
def test_the_whole_line_runs(zoo, name):
    (entry,) = (entry for entry in zoo.ENTRIES if entry.spec == name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        row = zoo.passed(entry)
    assert row["full"]["typical_error"] < 1e-3
    # Networks without ReLUs have nothing that t1 would quantize, and are told so.
    assert row["t1"].get("typical_error", 0) < 0.1
    assert "Use placement 'full'" in row["t1"].get("error", "Use placement 'full'")
