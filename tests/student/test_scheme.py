"""Bits of single layers."""

import pytest
from support import networks

import gdfq
from gdfq.errors import UsageError
from gdfq.execution.progress import Step
from gdfq.functional.grid import Bits
from gdfq.plan.method import resolve_method
from gdfq.quantizers.family import LSQ
from gdfq.quantizers.lsq import LearnedWeight
from gdfq.student.build import build_student
from gdfq.student.placement import activation_bits
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
        ("w2a2", "full", [], ["first=8", "last=8"]),
        ("w2a8", "full", [], ["first=8", "last=8"]),
        ("w4a2", "full", [], ["first=8", "last=8"]),
        ("w2a2", "full", ["fc=4"], ["fc=4", "first=8", "last=8"]),  # the first match counts
        ("w2a2", "full", ["last=2"], ["last=2", "first=8"]),
        ("w2a2", "full", ["first=float", "last=2"], ["first=float", "last=2"]),
        ("w3a3", "full", [], []),
        ("w2a2", "relu", [], []),
    ],
)
def test_ends_have_8_bits_by_default_below_3(
    bits: str, placement: str, said: list[str], expected: list[str]
) -> None:
    scheme = resolve_method(bits, placement=placement, layer_bits=said).scheme
    assert list(map(str, scheme.layer_bits)) == expected


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
