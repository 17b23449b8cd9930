"""Class names from a network to its student: what identifies the folders of a test."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import networks
from torch import nn

import gdfq
from gdfq.cli import main
from gdfq.deploy.safetensors import to_safetensors
from gdfq.files.plain_values import fingerprint
from gdfq.plan.network import resolve_network
from gdfq.plan.resolve import resolve
from gdfq.quantized import QuantizedNetwork

SHAPE = (3, 8, 8)
CODE = """
import torch
from torch import nn

class Colours(nn.Module):
    '''The class is the brightest channel.'''

    def __init__(self, names=None):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Linear(3, 3)
        for weight in (self.conv.weight, self.fc.weight):
            nn.init.eye_(weight.data.view(3, 3))
        nn.init.zeros_(self.fc.bias)
        self.names = names

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))

def factory():
    return Colours(["red", "green", "blue"])

def other_names():
    return Colours(["left", "right"])
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(CODE)
    return f"{tmp_path}/net.py:"


def test_images_are_generated_from_the_names_of_a_factory(spec: str, tmp_path: Path) -> None:
    generation = gdfq.Generation("diffusers:tiny", tmp_path / "pool")
    plan = resolve(f"{spec}factory", input_shape=SHAPE, recipe="quick", generate_with=generation)
    assert plan.generation is not None
    assert plan.generation.names == ("red", "green", "blue")


def test_names_of_another_number_are_no_class_names(spec: str) -> None:
    """A module can have any `names`, and keep those of a last layer that was replaced."""
    assert resolve_network(f"{spec}other_names", input_shape=SHAPE).class_names is None
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    for names, expected in ((["left", "right"], None), (["a", "b", "c"], (("a",), ("b",), ("c",)))):
        module.names = names  # type: ignore[assignment]
        assert resolve_network(module, torch.zeros(1, *SHAPE)).class_names == expected


def class_folders(place: Path, colours: dict[str, tuple[int, int, int]]) -> Path:
    """An image folder with one image of each colour, in the folder of its name."""
    for name, colour in colours.items():
        (place / name).mkdir(parents=True)
        Image.new("RGB", SHAPE[1:], colour).save(place / name / "image.png")
    return place


RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)
"""Classes 0, 1 and 2. By the order of the names red and blue would be the other class."""
SMALL = ["--bits", "w8a8", "--recipe", "quick", "--images", "4", "--iterations", "1"]


def test_evaluate_labels_folders_as_the_test_of_the_run(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = class_folders(tmp_path / "test", {"blue": BLUE, "green": GREEN, "red": RED})
    few = class_folders(tmp_path / "few", {"blue": BLUE, "red": RED})
    out = tmp_path / "out"
    words = ["quantize", f"{spec}factory", "--input", "3x8x8", "--mean", ".5", "--std", ".5"]
    assert main([*words, *SMALL, "--test", str(folder), "--out", str(out), "--no-report"]) == 0
    assert json.loads((out / "metrics.json").read_text())["student"]["top1"] == 100
    capsys.readouterr()
    for images in (folder, few):
        assert main(["evaluate", str(out), "--test", str(images)]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out == "top-1 100.00 %\n"


def test_students_evaluate_by_class_names_before_and_after_they_are_saved(
    spec: str, tmp_path: Path
) -> None:
    folder = class_folders(tmp_path / "test", {"blue": BLUE, "green": GREEN, "red": RED})
    few = class_folders(tmp_path / "few", {"blue": BLUE, "red": RED})
    student = gdfq.quantize(
        f"{spec}factory", input_shape=SHAPE, bits="w8a8", recipe="quick", mean=0.5, std=0.5,
        images=4, iterations=1, test=folder,
    )  # fmt: skip
    assert student.metrics["student"]["top1"] == 100
    student.save(tmp_path / "saved")
    student.export(tmp_path / "exported.safetensors")
    for place in (None, tmp_path / "saved", tmp_path / "exported.safetensors"):
        loaded = student if place is None else gdfq.load(place)
        assert loaded.card.class_names == (("red",), ("green",), ("blue",))
        assert [loaded.evaluate(images) for images in (folder, few)] == [100, 100]


def test_class_names_change_no_other_file_and_no_checkpoint(quantized: QuantizedNetwork) -> None:
    """Files of students without class names are as before there were any."""
    assert b"class_names" not in to_safetensors(quantized.whole, quantized.card)
    names = tuple((f"class {index}",) for index in range(networks.CLASSES))
    named = replace(quantized.card, class_names=names)
    assert fingerprint(named) == fingerprint(quantized.card)
