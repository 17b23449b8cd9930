"""A part of the zoo: published architectures go through the whole line, with random weights."""

from importlib import import_module

import pytest
from support import pages
from support.torchvision_shim import define_missing_operators

NAMES = {
    "ptcv:preresnet20_cifar10": "pytorchcv",
    "ptcv:densenet40_k12_cifar10": "pytorchcv",
    "timm:test_byobnet": "timm",
    "timm:test_convnext": "timm",
    "timm:test_vit": "timm",
    "timm:mobilenetv3_small_050": "timm",
    "torchvision:shufflenet_v2_x0_5": "torchvision",
    "torchvision:squeezenet1_1": "torchvision",
}


@pytest.fixture(scope="module")
def zoo():
    kept = define_missing_operators()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(pages.ROOT / "benchmarks")
        yield import_module("zoo")
    del kept


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.needs(needed)) for name, needed in NAMES.items()]
)
def test_an_architecture_passes(zoo, name):
    (entry,) = (entry for entry in zoo.ENTRIES if entry.spec == name)
    row = zoo.passed(entry)
    assert "error" not in row
    assert row["full"]["typical_error"] < 0.05
    if "error" in row["t1"]:
        assert "Use placement 'full'" in row["t1"]["error"]
    else:
        assert row["t1"]["typical_error"] < 0.05
