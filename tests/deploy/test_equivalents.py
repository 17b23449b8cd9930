"""Operators that ONNX lacks or that ONNX Runtime computes otherwise, written by equal ones."""

from collections.abc import Callable

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from support.operator_calls import call
from torch import Tensor, nn

import gdfq
from gdfq import UsageError
from gdfq.deploy.onnx import exporter
from gdfq.deploy.onnx.equivalents import with_equivalents
from gdfq.deploy.onnx.session import onnx_session
from gdfq.functional.windows import source_pixels
from gdfq.graph import operators
from gdfq.graph.capture import capture
from gdfq.graph.inputs import InputSpec
from gdfq.graph.tensors import flat_module, tensors_of
from gdfq.quantized import QuantizedNetwork

pytestmark = pytest.mark.check  # many networks: minutes


class Of(nn.Module):
    """Functions of one tensor, each of whose results is an output."""

    def __init__(self, *functions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        found = [function(x) for function in self.functions]
        return found if len(found) > 1 else found[0]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_onnx(network: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of a network that ONNX Runtime computes, from what is written for it."""
    teacher = capture(network, x[:1], classifier=False)
    graph = with_equivalents(teacher.network.graph)
    model = exporter.exported(flat_module(graph, tensors_of(teacher.network)), teacher.inputs)
    model.graph.inputs[0].name = "x"
    session = onnx_session(ir.to_proto(model).SerializeToString())
    return [torch.from_numpy(y) for y in session.run(None, {"x": x.numpy()})]


def check(*functions: Callable[[Tensor], Tensor], shape: tuple[int, ...] = (4, 6, 6)) -> None:
    """Compare ONNX Runtime with PyTorch, at another length of the batch than the traced one."""
    x = noise(3, *shape)
    network = Of(*functions)
    found = network(x)
    for expected, actual in zip(
        found if isinstance(found, list) else [found], in_onnx(network, x), strict=True
    ):
        torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=1e-4, atol=1e-5)


_ATEN = sorted(name for name in operators.ALLOWED if name.startswith("aten."))
_TOGETHER = 16
"""Operators in one file: a file of one operator takes as long."""


@pytest.mark.parametrize("first", range(0, len(_ATEN), _TOGETHER))
def test_every_operator_has_an_equal_form_in_onnx(first: int) -> None:
    """An operator without one must be refused before a run, by its name (no operator is now)."""
    check(*map(call, _ATEN[first : first + _TOGETHER]))


def test_poolings_with_all_options_are_equal() -> None:
    check(
        lambda x: F.avg_pool2d(x, 2, divisor_override=1),
        lambda x: F.avg_pool2d(x, 3, 2, 1, True, False, 5),
        lambda x: F.avg_pool2d(x, (2, 3), (2, 1), (1, 0), False, False, 4),
        lambda x: F.avg_pool2d(x, 4, 3, 2, True, True, 2),
        lambda x: F.avg_pool3d(x[:, None], 2, 2, 1, True, True, 3),
        lambda x: F.avg_pool2d(x, 4, 3, 2, True),
        lambda x: F.avg_pool2d(x, 4, 3, 2, True, False),
        lambda x: F.avg_pool1d(x.flatten(2), 3, 2, 1, True, False),
        lambda x: F.max_pool2d(x, 4, 3, 2, 1, True),
        lambda x: F.max_pool2d(x, 2, 1, 1, 3),
        lambda x: F.max_pool1d(x.flatten(2), 3, 2, 1, 2, True),
        lambda x: F.max_pool3d(x[:, None], 2, 2, 1, 1, True),
    )


def test_adaptive_poolings_to_uneven_sizes_are_equal() -> None:
    check(
        *(
            lambda x, pool=pool, size=size: pool(x, size)
            for pool in (F.adaptive_max_pool2d, F.adaptive_avg_pool2d)
            for size in (1, 3, 4, 5, 9, (None, 5), (1, 4), (8, 1))
        ),
        lambda x: F.adaptive_max_pool3d(x[:, None], (3, 8, 1)),
        lambda x: F.adaptive_avg_pool3d(x[:, None], (3, 8, 1)),
        lambda x: F.adaptive_max_pool1d(x.flatten(2), 7),
    )


def test_paddings_with_negative_ends_are_equal() -> None:
    check(
        lambda x: F.pad(x, (-1, 2, 1, -2)),
        lambda x: F.pad(x, (-1, 2, 1, -2), value=0.7),
        lambda x: F.pad(x, (-1, 2, 1, -2), mode="reflect"),
        lambda x: F.pad(x, (-1, 2, 1, -2), mode="replicate"),
        lambda x: F.pad(x, (-1, 2, 1, -2), mode="circular"),
        lambda x: F.pad(x.flatten(2), (2, 3), mode="circular"),
        lambda x: F.pad(x[:, None], (1, 1, 0, 2, 1, 0), mode="replicate"),
    )


def test_source_pixels_are_those_of_pytorch() -> None:
    for side in range(1, 45):
        ramp = torch.arange(float(side)).view(1, 1, -1)
        for count in range(1, 70):
            expected = F.interpolate(ramp, size=count).flatten().int().tolist()
            assert source_pixels(side, count, None) == expected
        for factor in (0.3, 1.1, 1.3333, 1.7, 2.0, 2.5, 3.0, 7.0):
            if int(side * factor):
                expected = F.interpolate(ramp, scale_factor=factor).flatten().int().tolist()
                assert source_pixels(side, int(side * factor), factor) == expected


def test_nearest_upsampling_is_equal_where_onnx_runtime_rounds_otherwise() -> None:
    """PyTorch takes pixel 6 for place 7 of 16 from 14 (7 · 0.875 = 6.125), as for 28 to 32."""
    check(
        *(
            lambda x, size=size: F.interpolate(x, size=size)
            for size in ((16, 32), (32, 16), (25, 14), (14, 7), (28, 56))
        ),
        *(
            lambda x, factor=factor: F.interpolate(x, scale_factor=factor)
            for factor in (2, 1.7, 0.7, (1.3, 2.0))
        ),
        shape=(2, 14, 28),
    )


class Conditional(nn.Module):
    """A convolution whose weight, and perhaps bias, is computed from each image."""

    def __init__(self, function: Callable[..., Tensor], inputs: int, outputs: int) -> None:
        super().__init__()
        self.function = function
        torch.manual_seed(0)
        self.weight, self.bias = nn.Linear(4, inputs), nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        features, n = x.mean((2, 3)), x.shape[0]
        images = x.reshape(1, n * 4, *x.shape[2:])
        y = self.function(images, self.weight(features), self.bias(features).view(-1), n)
        return y.reshape(n, -1, *y.shape[2:])


@pytest.mark.parametrize(
    ("function", "weights"),
    [
        (lambda x, w, b, n: F.conv2d(x, w.view(n * 5, 4, 3, 3), padding=1, groups=n), 180),
        (lambda x, w, b, n: F.conv2d(x, w.view(n * 5, 4, 3, 2), b, (2, 1), (1, 2), (1, 2), n), 120),
        (lambda x, w, b, n: F.conv2d(x, w.view(n * 5, 4, 2, 4), padding="same", dilation=2, groups=n), 160),
        (lambda x, w, b, n: F.conv2d(x, w.view(n * 4, 1, 3, 3), groups=n * 4), 36),
        (lambda x, w, b, n: F.conv1d(x.flatten(2), w.view(n * 5, 4, 3), b, groups=n)[..., None], 60),
        (lambda x, w, b, n: F.conv_transpose2d(x, w.view(n * 4, 5, 3, 3), b, 2, 1, 1, n, 2), 180),
        (lambda x, w, b, n: F.conv_transpose2d(x, w.view(n * 4, 5, 1, 2), None, 1, 2, 0, n), 40),
    ],
    ids=["plain", "options", "same", "depthwise", "1d", "transposed", "cropped"],
)  # fmt: skip
def test_convolution_with_a_weight_of_each_image_is_equal(
    function: Callable[..., Tensor], weights: int
) -> None:
    x = noise(3, 4, 6, 6)
    network = Conditional(function, weights, 5)
    with torch.no_grad():
        expected = network(x)
    (actual,) = in_onnx(network, x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def _quantized(operator: nn.Module, side: int) -> QuantizedNetwork:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), operator),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(8, 5),
    ).train()
    with torch.no_grad():
        network(noise(16, 3, side, side))
    return gdfq.quantize(
        network.eval(), torch.zeros(1, 3, side, side), "w8a8", "real", steps=4,
        data=noise(16, 3, side, side), placement="full",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "side", "kinds"),
    [
        (nn.Upsample((16, 16)), 14, ["Gather", "Gather"]),
        (nn.Upsample(scale_factor=2), 6, ["Resize"]),
        (nn.AdaptiveMaxPool2d(5), 14, ["Gather", "Gather", "MaxPool"]),
        (nn.AdaptiveMaxPool2d(1), 6, ["MaxPool"]),
        (Of(lambda x: x.roll((1, -2), (2, 3))), 6, ["Concat", "Concat"]),
    ],
)
def test_operator_that_moves_values_moves_codes(
    operator: nn.Module, side: int, kinds: list[str], tmp_path: object
) -> None:
    """The next layer reads integers: nothing is computed in float."""
    exported = _quantized(operator, side).export(f"{tmp_path}/q.onnx")
    assert exported.inside.typical_error < 1e-5
    assert exported.beyond.typical_error < 1e-5
    assert not any("computed in float" in note for note in exported.notes)
    nodes = [node.op_type for node in onnx.load(f"{tmp_path}/q.onnx").graph.node]
    found = [kind for kind in nodes if kind in {"Concat", "Gather", "MaxPool", "Resize"}]
    assert found == kinds


def test_average_pooling_with_a_divisor_is_exported(tmp_path: object) -> None:
    exported = _quantized(nn.AvgPool2d(2, divisor_override=1), 8).export(f"{tmp_path}/q.onnx")
    assert exported.inside.relative_error < 1e-5


def test_operator_without_a_form_is_named_without_codes_of_terminals() -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.adaptive_max_pool2d(x, 5) + 1

    network = torch.export.export(Unknown(), (noise(2, 3, 14, 14),)).module()
    with pytest.raises(UsageError, match=r"adaptive_max_pool2d of 'adaptive_max_pool2d'") as caught:
        exporter.exported(network, [InputSpec.of("x", noise(1, 3, 14, 14))])
    assert "\x1b" not in str(caught.value)
