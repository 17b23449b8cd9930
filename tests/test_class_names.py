"""Class names from a network to its student: what identifies the folders of a test."""

from pathlib import Path

import pytest
import torch
from torch import nn

import gdfq
from gdfq.plan.network import resolve_network
from gdfq.plan.resolve import resolve

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
