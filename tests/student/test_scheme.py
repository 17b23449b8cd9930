"""Bits of single layers."""

import pytest
import torch
from support import networks
from torch import Tensor, nn

import gdfq
from gdfq.errors import UsageError
from gdfq.execution.progress import Step
from gdfq.functional.grid import Bits
from gdfq.graph import queries
from gdfq.graph.capture import capture
from gdfq.plan.method import resolve_method
from gdfq.plan.resolve import resolve
from gdfq.quantizers.family import LSQ
from gdfq.quantizers.lsq import LearnedWeight
from gdfq.student.build import build_student
from gdfq.student.narrow import narrow_layers
from gdfq.student.placement import activation_bits, layer_input_bits
from gdfq.student.scheme import LayerBits, Placement, Scheme


def widths(name: str, placement: Placement) -> dict[str, int]:
    teacher = networks.captured(name)
    chosen = activation_bits(teacher, Scheme(Bits(3, 4), placement))
    return {node.name: bits for node, bits in chosen.items()}


def test_layer_bits_apply_to_the_layer_and_to_inputs_of_it_alone() -> None:
    teacher = networks.captured("Residual")

    def widths(placement: Placement, *keep: str) -> dict[str, int]:
        scheme = Scheme(Bits(4, 4), placement, tuple(map(LayerBits.parse, keep)))
        return {n.name: bits for n, bits in activation_bits(teacher, scheme).items()}

    free = widths("full")
    assert free == {"x": 8, "relu": 8, "batch_norm_1": 8, "relu_1": 4, "avg_pool2d": 4}
    kept = widths("full", "conv1=float")
    assert kept == {name: bits for name, bits in free.items() if name != "x"}
    # conv2's input also enters the addition, the last layer's enters that alone.
    # conv2's input also enters the addition; the last layer's enters that alone.
    assert widths("full", "conv2=float", "last=8") == free | {"avg_pool2d": 8}
    assert widths("full", "last=3") == free  # never narrower than asked for
    assert widths("relu", "conv*=float") == {"relu": 4, "relu_1": 4}


def test_layer_bits_apply_to_weights() -> None:
    teacher = networks.captured("Branches")
    keep = tuple(map(LayerBits.parse, ("first=float", "fc=8", "*=3")))
    student = build_student(teacher, Scheme(Bits(4, 4), "full", keep), quantizers=LSQ)
    bits = {
        name.rpartition(".")[2]: module.bits
        for name, module in student.named_modules()
        if isinstance(module, LearnedWeight)
    }
    assert bits == {"conv2d_1": 3, "conv2d_2": 3, "conv2d_3": 3, "linear": 8}


@pytest.mark.parametrize(
    ("bits", "placement", "said", "expected"),
    [
        ("w2a2", "full", [], ["first=7", "last=7", "narrow=7"]),
        ("w2a8", "full", [], ["first=7", "last=7", "narrow=7"]),
        ("w4a2", "full", [], ["first=7", "last=7", "narrow=7"]),
        ("w8a2", "full", [], ["first=8", "last=8", "narrow=8"]),
        # The first match counts.
        ("w2a2", "full", ["fc=4"], ["fc=4", "first=7", "last=7", "narrow=7"]),
        ("w2a2", "full", ["last=2"], ["last=2", "first=7", "narrow=7"]),
        ("w2a2", "full", ["first=float", "last=2", "narrow=2"],
         ["first=float", "last=2", "narrow=2"]),
        ("w3a3", "full", [], ["narrow=7"]),
        ("w4a8", "full", [], ["narrow=7"]),
        ("w7a8", "full", [], ["narrow=7"]),
        ("wfp4a8", "full", [], ["narrow=8"]),
        ("w4afp4", "full", [], ["narrow=8"]),
        ("w8a4", "full", ["narrow=4"], ["narrow=4"]),
        ("w8a8", "full", [], []),
        ("w2a2", "relu", [], []),
    ],
)  # fmt: skip
def test_some_layers_of_deployable_networks_have_more_bits_by_default(
    bits: str, placement: str, said: list[str], expected: list[str]
) -> None:
    scheme = resolve_method(bits, placement=placement, layer_bits=said).scheme
    assert list(map(str, scheme.layer_bits)) == expected


class Narrow(nn.Module):
    """Layers on both sides of each condition, and enough weights for all narrow ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)  # 27 products, of pixels
        self.depthwise = nn.Conv2d(8, 16, 7, groups=8, padding=3)  # 49, from one channel
        self.grouped = nn.Conv2d(16, 36, 3, groups=4)  # 36, from four channels
        self.expand = nn.Conv2d(36, 32, 1)  # 36
        self.project = nn.Conv2d(32, 32, 1)  # 32
        self.wide = nn.Conv2d(32, 600, 3)  # 288
        self.fc = nn.Linear(600, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (
            self.stem,
            self.depthwise,
            self.grouped,
            self.expand,
            self.project,
            self.wide,
        ):
            x = layer(x).relu()
        found: Tensor = self.fc(x.mean((2, 3)))
        return found


def test_narrow_layers_and_their_inputs_have_7_bits() -> None:
    def bits(*said: str, all_bits: str = "w4a4") -> tuple[dict[str, int], dict[str, int]]:
        plan = resolve(Narrow(), torch.randn(1, 3, 16, 16), all_bits, "quick", layer_bits=said)
        layers = queries.weighted_layers(plan.teacher.network)
        entering = activation_bits(plan.teacher, plan.scheme)
        entering |= layer_input_bits(plan.teacher, plan.scheme)
        inputs = {queries.layer_name(layer): entering[queries.input_of(layer)] for layer in layers}
        weights = plan.scheme.weight_bits(layers)
        return {queries.layer_name(layer): n for layer, n in weights.items()}, inputs

    few = dict.fromkeys(("stem", "depthwise", "grouped", "expand", "project", "wide", "fc"), 4)
    narrow = dict.fromkeys(("depthwise", "project"), 7)
    pixels = {"stem": 8}
    assert bits() == (few | narrow, few | narrow | pixels)
    assert bits("narrow=4") == (few, few | pixels)
    assert bits(all_bits="w4a8") == (few | narrow, dict.fromkeys(few, 8))
    assert bits("wide=8", "project=2")[0] == few | narrow | {"wide": 8, "project": 2}


def test_narrow_layers_hold_a_sixteenth_of_the_weights_at_most() -> None:
    """Of 16 n weights n are 1 or 2 layers, the smaller of which goes first."""

    def narrow(wide: int) -> list[str]:
        stem = nn.Conv2d(4, 4, 1, bias=False)
        layers = [stem, nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, wide, 3)]
        return narrow_layers(capture(nn.Sequential(*layers), torch.zeros(1, 4, 3, 3)))

    assert narrow(12) == ["1", "2"]  # 16 + 24 of 704
    assert narrow(11) == ["1", "2"]  # of 650: 6.15 %
    assert narrow(10) == ["1"]  # of 596: 6.7 %
    assert narrow(4) == ["1"]  # 16 of 272: 5.9 %
    assert narrow(3) == []  # 16 of 218


def test_weights_of_a_layer_with_several_calls_count_once() -> None:
    stem, few, many = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def narrow(*layers: nn.Module) -> list[str]:
        return narrow_layers(capture(nn.Sequential(*layers), torch.zeros(1, 4, 3, 3)))

    assert narrow(stem, few, many, many, many) == []  # 16 of 176
    assert narrow(stem, few, few, nn.Conv2d(4, 7, 3)) == ["2"]  # 16 of 284
    assert narrow(stem, few, few, nn.Conv2d(4, 6, 3)) == []  # 16 of 248


def test_networks_without_narrow_layers_have_no_bits_for_them() -> None:
    plan = resolve(networks.captured("Residual"), None, "w4a4", "quick")
    assert plan.scheme.layer_bits == ()


def test_size_instead_of_bits_leaves_the_ends_to_the_choice() -> None:
    assert resolve_method("auto", size=1000).scheme.layer_bits == ()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("convv=8", r"'convv' matches none of: conv1, conv2, fc"),
        ("*=float", "but those that stay float"),
        ("conv1", "PATTERN=BITS with 2..8 bits, or PATTERN=float"),
        ("conv1=9", "2..8 bits"),
        ("=8", "PATTERN=float"),
    ],
)
def test_invalid_layer_bits_are_refused(keep: str, message: str) -> None:
    teacher = networks.captured("Residual")
    with pytest.raises(UsageError, match=message):
        build_student(teacher, Scheme(Bits(4, 4), "full", (LayerBits.parse(keep),)))


def test_scheme_that_fits_no_layer_fails_before_images_are_made() -> None:
    heard: list[Step] = []
    with pytest.raises(UsageError, match="nosuchlayer"):
        gdfq.quantize(
            networks.captured("Residual"),
            networks.images(1),
            recipe="quick",
            layer_bits=["nosuchlayer=8"],
            listener=heard.append,
        )
    assert not heard
