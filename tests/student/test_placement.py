"""Which tensors each placement quantizes."""

from collections.abc import Callable

import pytest
import torch
from support import networks
from support.students import transformer
from torch import Tensor, nn

from gdfq.functional.grid import Bits
from gdfq.graph import operators
from gdfq.graph.capture import Captured, capture
from gdfq.quantizers.family import LSQ
from gdfq.sources.base import Batch
from gdfq.student.build import build_student
from gdfq.student.freeze import freeze
from gdfq.student.placement import activation_bits, layer_input_bits
from gdfq.student.scheme import LayerBits, Placement, Scheme
from gdfq.tuning.calibrate import calibrate_

ZEROS = torch.zeros(1, *networks.Transformer.SHAPE)


@pytest.fixture(scope="module")
def small() -> Captured:
    return capture(transformer(), ZEROS)


def test_placement_of_a_transformer(small: Captured) -> None:
    widths = activation_bits(small, Scheme(Bits(4, 4), "full"))
    names = {node.name: bits for node, bits in widths.items()}
    # Per block: queries, keys and values (one layer's output) 8; the attention's weights, its
    # output, what enters the layers, and GELU 4; what the residual path carries 8. Scores, norms
    # and logits stay float.
    assert {name: bits for name, bits in names.items() if "softmax" in name} == {
        "softmax": 4,
        "softmax_1": 4,
    }
    by_kind: dict[str, set[int]] = {}
    for name, bits in names.items():
        by_kind.setdefault(name.rstrip("0123456789").rstrip("_"), set()).add(bits)
    assert by_kind == {
        "x": {8},
        "conv2d": {8},
        "linear": {8},
        "expand": {8},
        "cat": {8},
        "add": {8},
        "softmax": {4},
        "matmul": {4},
        "layer_norm": {4},
        "gelu": {4},
    }
    products = [n for n in small.network.graph.nodes if operators.name_of(n) in operators.PRODUCTS]
    scores = products[0::2]
    assert not any(node in widths for node in scores)


def widths(name: str, placement: Placement) -> dict[str, int]:
    teacher = networks.captured(name)
    chosen = activation_bits(teacher, Scheme(Bits(3, 4), placement))
    return {node.name: bits for node, bits in chosen.items()}


def test_placement_relu_quantizes_outputs_of_relus_only() -> None:
    assert widths("Residual", "relu") == {"relu": 4, "relu_1": 4}
    assert widths("Branches", "relu") == {"hardtanh": 4, "hardtanh_1": 4, "relu": 4}


def test_placement_full_of_a_residual_network() -> None:
    # Input 8; first ReLU 8, because it enters the addition, and 4 on its way into the second
    # convolution; that one's output, through its norm, 8 (it enters the addition without a ReLU);
    # the sum's ReLU 4 (it enters pooling); pooled features 4; no logits.
    assert widths("Residual", "full") == {
        "x": 8,
        "relu": 8,
        "batch_norm_1": 8,
        "relu_1": 4,
        "avg_pool2d": 4,
    }
    assert into_layers("Residual") == {"relu": 4}
    assert into_layers("Residual", "conv2=8") == {}
    assert into_layers("Residual", "conv2=float") == {}
    assert into_layers("Residual", "conv2=6") == {"relu": 6}
    assert into_layers("Residual", "conv2=2") == {"relu": 4}  # never narrower than asked for
    assert into_layers("Residual", placement="relu") == {}


def into_layers(name: str, *keep: str, placement: Placement = "full") -> dict[str, int]:
    scheme = Scheme(Bits(3, 4), placement, tuple(map(LayerBits.parse, keep)))
    found = layer_input_bits(networks.captured(name), scheme)
    return {node.name: bits for node, bits in found.items()}


class Bottlenecks(nn.Module):
    """A sum that enters a layer and the next sum; one part is the pooled output of a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a = torch.max_pool2d(torch.relu(self.first(x)), 2)
        b = self.second(a) + a
        return torch.mean(self.third(b) + b + 1, (2, 3))


def test_what_enters_layers_and_sums_is_carried_in_8_bits() -> None:
    """`a` and `b` have 8 bits, and 2 on their way into layers; what is pooled has 2."""
    x = torch.randn(4, 3, 8, 8)
    teacher, scheme = capture(Bottlenecks().eval(), x), Scheme(Bits(4, 2), "full")
    carried = {n.name: bits for n, bits in activation_bits(teacher, scheme).items()}
    assert carried == {
        "x": 8,
        "relu": 8,
        "conv2d_1": 8,
        "add": 8,
        "conv2d_2": 8,
        "add_1": 8,
        "add_2": 2,
    }
    entering = {n.name: bits for n, bits in layer_input_bits(teacher, scheme).items()}
    assert entering == {"relu": 2, "add": 2}
    student = build_student(teacher, scheme, quantizers=LSQ)
    calibrate_(student, [Batch((x,), None, None)], steps=1)
    layers = freeze(student).layers
    assert [layer.input.bits for layer in layers if layer.input is not None] == [8, 2, 2]


def test_placement_full_of_branches() -> None:
    # Max pooling and padding keep the grid of what they move, so nothing follows them; the
    # concatenation joins two grids, with 8 bits each, and is quantized again; "same" convolution feeds a ReLU.
    assert widths("Branches", "full") == {
        "x": 8,
        "hardtanh": 4,
        "hardtanh_1": 8,
        "batch_norm_1": 8,
        "cat": 4,
        "relu": 4,
        "adaptive_avg_pool2d": 4,
    }


def test_placement_full_with_squeeze_and_excitation() -> None:
    assert widths("Preactivation", "full") == {
        "relu": 4,  # the norm before it has no convolution to be folded into
        "batch_norm_1": 8,  # convolution → norm → SiLU: quantized before the SiLU
        "silu": 4,
        "mean": 4,
        "conv2d_1": 8,
        "sigmoid": 4,
        "mul": 4,
        "mean_1": 4,
        "relu_1": 4,
    }


def test_inner_normalisation_keeps_eight_bits_up_to_the_first_layer() -> None:
    chosen = widths("Awkward", "full")
    assert (chosen["x"], chosen["sub"], chosen["div"]) == (8, 8, 8)


class Scores(torch.nn.Module):
    """A layer whose outputs only a softmax reads, scaled and moved; and one that others read too."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.values = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.scores(x) / 2 + 1).flatten(2).softmax(2)
        values = self.values(x).flatten(2)
        return weights @ values.transpose(1, 2) + values.softmax(2) @ values.transpose(1, 2)


def names_in_full_placement(network: torch.nn.Module, *shape: int) -> set[str]:
    teacher = capture(network.eval(), torch.zeros(1, *shape))
    return {node.name for node in activation_bits(teacher, Scheme(Bits(8, 8), "full"))}


def test_scores_that_only_a_softmax_reads_stay_float() -> None:
    names = names_in_full_placement(Scores(), 3, 4, 4)
    assert "conv2d" not in names  # self.scores
    assert "conv2d_1" in names
    assert {"softmax", "softmax_1"} <= names  # matrix products read integers


def softmax_pooling(scores: Tensor, x: Tensor) -> Tensor:
    return (scores.softmax(2) * x).sum(2)


def written_out_pooling(scores: Tensor, x: Tensor) -> Tensor:
    weights = (scores - scores.amax(2, keepdim=True)).exp()
    return (weights / weights.sum(2, keepdim=True) * x).sum(2)


def pooling_divided_at_last(scores: Tensor, x: Tensor) -> Tensor:
    weights = scores.exp()
    return (weights * x).sum(2) / weights.sum(2)


def scaled_pooling(scores: Tensor, x: Tensor) -> Tensor:
    return torch.relu(64 * (scores.softmax(2) * x)).mean(2)


def expected_position(scores: Tensor, x: Tensor) -> Tensor:
    return (scores.softmax(2).view(-1, 4, 4, 4).sum(3) * torch.arange(4.0)).sum(2)


class Pools(torch.nn.Module):
    """A network that pools features with weights of positions."""

    def __init__(self, pooling: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.scores = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 1)
        self.head, self.pooling = torch.nn.Linear(4, 2), pooling

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.head(self.pooling(self.scores(x).flatten(2), x.flatten(2)))


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        (softmax_pooling, {"sum_1"}),
        (written_out_pooling, {"conv2d_1", "sum_1"}),
        (pooling_divided_at_last, {"conv2d_1", "div"}),
        (scaled_pooling, {"mean"}),
        (expected_position, {"sum_2"}),
    ],
)
def test_weights_of_positions_and_their_products_stay_float(
    pooling: Callable[[Tensor, Tensor], Tensor], expected: set[str]
) -> None:
    """Their grid would be too coarse; what layers read is quantized."""
    assert names_in_full_placement(Pools(pooling), 3, 4, 4) == {"x", "relu"} | expected


def test_elementwise_product_that_a_layer_reads_is_quantized() -> None:
    class Gated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 1)
            self.head = torch.nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            return self.head(torch.relu(self.last(x.softmax(1) * x)))

    # No integer kernel reads the first ReLU, but the layer before it returns codes.
    assert names_in_full_placement(Gated(), 3, 4, 4) == {"x", "relu", "mul", "relu_1"}


class _Clamped(torch.nn.Module):
    """Clamps behind convolutions, some of them with another reader or none that reads integers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e, f = self.layers
        x = a(x).clamp(-1, 2)  # alone: the clamp
        x = b(x).clamp(0.5, 2)  # excludes 0: the layer, and the clamp
        x = torch.relu(c(x)).square()  # read by what has no integer form: the ReLU
        y = d(x)  # read by two: the layer, and both clamps
        x = e(y.clamp(-1, 1) + torch.relu(y))
        return f(torch.relu(x).clamp(max=3.0)).mean((2, 3))  # of two clamps the last


def test_layer_is_rounded_behind_its_clamp() -> None:
    teacher = capture(_Clamped().eval(), torch.zeros(1, 3, 8, 8))
    chosen = activation_bits(teacher, Scheme(Bits(4, 4), "full"))
    found = {node.name: bits for node, bits in chosen.items()}
    assert found == {
        **dict.fromkeys(("x", "conv2d_1", "conv2d_3", "conv2d_5"), 8),
        "clamp": 4,
        "clamp_1": 4,
        "relu": 8,
        "square": 4,  # no integer kernel reads the ReLU
        "clamp_2": 8,  # it enters a sum, as the next does
        "relu_1": 8,
        "add": 4,
        "clamp_3": 4,
    }
