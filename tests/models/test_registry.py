"""Networks by name, and what is given beside it."""

from pathlib import Path

import pytest
from safetensors.torch import save_file
from support import torchvision_shim
from torch import nn

from gdfq.cli import main
from gdfq.data.preprocessing import Preprocessing, Resize
from gdfq.errors import UsageError
from gdfq.models.registry import Loaded, load_model

_OPERATORS = torchvision_shim.define_missing_operators()  # they are there while this lives


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", "resnet18 needs its library: timm:resnet18 or .* MODEL is .* timm:NAME"),
        ("net.py", r"net\.py needs the name of a factory: net\.py:NAME\. MODEL is "),
        ("", "must name a library, a factory or a program. MODEL is "),
        (":", "must name a library, a factory or a program. MODEL is "),
        ("torchvison:resnet18", r"no 'torchvison'\. Did you mean torchvision:resnet18\?"),
        ("nowhere_at_all:net", "must be importable"),
    ],
)
def test_spec_without_a_place_or_a_factory_is_refused(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_model(spec)


def test_folder_without_its_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"is a folder; give it as hf:FOLDER or diffusers:FOLDER\. MODEL is"
    ):
        load_model(str(tmp_path))


def test_given_values_override_known_ones() -> None:
    own = Preprocessing((0.1,) * 3, (0.2,) * 3, Resize(0.9, interpolation="bicubic"))
    loaded = Loaded(nn.Identity(), (3, 8, 8), own)
    assert loaded.input() == ((3, 8, 8), own)
    shape, preprocessing = loaded.input((3, 9, 9), std=(0.5,) * 3)
    assert shape == (3, 9, 9)
    assert preprocessing == Preprocessing((0.1,) * 3, (0.5,) * 3, own.resize)
    assert Loaded(nn.Identity()).input((1, 4, 4))[1] == Preprocessing((0.0,), (1.0,))
    with pytest.raises(UsageError, match="--input 3x32x32"):
        Loaded(nn.Identity()).input()
    with pytest.raises(UsageError, match="each of the 1 input channels"):
        loaded.input((1, 8, 8))


def test_unknown_shape_must_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text("import torch\nfactory = torch.nn.Identity\n")
    for command in ("quantize", "generate"):
        call = [command, f"{tmp_path}/net.py:factory", "--out", str(tmp_path / command)]
        assert main(call) == 2
        assert "--input 3x32x32" in capsys.readouterr().err


def test_spec_that_names_no_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ONNX files cannot be read.*\.pt2 file"):
        load_model("net.onnx")
    (tmp_path / "net.py").write_text("import torch\nfactory = torch.nn.Identity\n")
    with pytest.raises(UsageError, match="Remove --weights"):
        load_model(f"{tmp_path}/net.py:factory", "random")


_NAMED = """
from types import SimpleNamespace
from torch import nn

class Named(nn.Linear):
    def __init__(self, **values):
        super().__init__(4, 2)
        vars(self).update(values)

def ultralytics():
    return Named(names={0: "red car", 1: "bus"})

def transformers():
    return Named(config=SimpleNamespace(id2label={0: "red car", 1: "bus"}))

def wrapped():
    return nn.DataParallel(ultralytics())

def nameless():
    return Named()
"""
"""Factories of networks that have names of their classes, and of one that has none."""


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("factory", ["ultralytics", "transformers", "wrapped", "nameless"])
def test_network_of_code_has_its_own_class_names(
    tmp_path: Path, factory: str, weights: bool
) -> None:
    (tmp_path / "net.py").write_text(_NAMED)
    file = tmp_path / "w.safetensors"
    save_file(nn.Linear(4, 2).state_dict(), file)
    loaded = load_model(f"{tmp_path}/net.py:{factory}", file if weights else None)
    expected = None if factory == "nameless" else (("red car",), ("bus",))
    assert loaded.class_names == expected
