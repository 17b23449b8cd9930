"""The preflight diagnosis, against independent counts and against the run itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import networks, unusual
from support.narrowing import instance
from torch import Tensor, nn

import gdfq
from gdfq.analysis.cost import with_costs
from gdfq.analysis.float_operators import FloatOperators
from gdfq.analysis.preflight import diagnose
from gdfq.functional.grid import Bits
from gdfq.graph.capture import capture
from gdfq.recipes import find_recipe
from gdfq.student.scheme import LayerBits, Scheme

FULL = Scheme(Bits(4, 4), "full")


NO_FORM = "no integer form"


def counted_by_hooks(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Multiply-accumulates of one image: a module's outputs times what each is made from."""
    counts = {}

    def note(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if isinstance(module, nn.ConvTranspose2d):
                each = instance(module.weight, Tensor)[0].numel()
                counts[name] = inputs[0][0].numel() * each
            else:
                counts[name] = output[0].numel() * instance(module.weight, Tensor)[0].numel()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.register_forward_hook(note(name))
    model(x)
    return counts


@pytest.mark.parametrize("name", ["Residual", "Branches", "Transposed", "Segmenter"])
def test_operations_and_parameters_against_hooks(name: str) -> None:
    model = networks.make(name)
    diagnosis = diagnose(capture(model, networks.images(1)), FULL, find_recipe("fast"))
    counts = counted_by_hooks(model, networks.images(1))
    assert {layer.name: layer.operations for layer in diagnosis.layers} == counts
    assert diagnosis.operations == sum(counts.values())
    assert diagnosis.parameters == sum(p.numel() for p in model.parameters())
    assert not diagnosis.problems


def test_operations_of_attention_include_its_products() -> None:
    teacher = capture(networks.make("Transformer"), torch.zeros(1, 1, 8, 8))
    diagnosis = diagnose(teacher, FULL, find_recipe("patches"))
    layers = sum(layer.operations for layer in diagnosis.layers)
    # Two blocks of four heads: 17 x 17 scores of 8 products each, and as many to weight the values.
    assert diagnosis.operations - layers == 2 * 2 * 4 * 17 * 17 * 8
    assert FloatOperators("layer_norm", 5, NO_FORM) in diagnosis.float_operators
    assert FloatOperators("softmax", 2, NO_FORM) in diagnosis.float_operators
    assert diagnosis.batch_norms == 0


class Sequence(nn.Module):
    """Attention with the sequence first, as in `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).permute(2, 0, 1)
        return self.fc(self.attention(x, x, x, need_weights=False)[0].mean(0))


def test_operations_are_per_image_where_the_batch_is_not_the_first_dimension() -> None:
    teacher = capture(Sequence().eval(), torch.zeros(1, 8, 2, 5))
    diagnosis = diagnose(teacher, FULL, find_recipe("patches"))
    names = [layer.name for layer in diagnosis.layers]
    assert names == ["attention.in_proj", "attention.out_proj", "fc"]
    counts = [layer.operations for layer in diagnosis.layers]
    assert counts == [10 * 8 * 24, 10 * 8 * 8, 8 * 3]  # ten positions
    assert diagnosis.operations == sum(counts) + 2 * 2 * 10 * 10 * 4


def test_what_is_on_no_grid_is_float() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    )
    teacher = capture(model.eval(), networks.images(1))
    recipe = find_recipe("real")
    full = diagnose(teacher, FULL, recipe)
    assert full.float_operators == ()
    with_float_layer = diagnose(
        teacher, Scheme(Bits(4, 4), "full", (LayerBits("2", None),)), recipe
    )
    assert with_float_layer.float_operators == (
        FloatOperators("conv2d", 1, "float by --layer-bits, or by default"),
    )
    published = diagnose(teacher, Scheme(Bits(4, 4), "relu"), recipe)
    why = "its input is not the output of a ReLU; placement relu quantizes only those"
    assert published.float_operators == (  # the input's, and the last
        FloatOperators("conv2d", 1, why),
        FloatOperators("linear", 1, why),
    )


def test_operators_that_only_shape_outputs_are_float() -> None:
    teacher = networks.captured("Detector")
    found = diagnose(teacher, FULL, find_recipe("fast")).float_operators
    assert FloatOperators("sigmoid", 2, NO_FORM) in found
    assert FloatOperators("cat", 1, "only shapes the outputs") in found


def test_bits_are_those_of_the_run() -> None:
    model = networks.make("Residual")
    scheme = Scheme(Bits(3, 4), "full", (LayerBits("fc", None),))
    diagnosis = diagnose(capture(model, networks.images(1)), scheme, find_recipe("fast"))
    assert [(layer.name, layer.bits, layer.input_bits) for layer in diagnosis.layers] == [
        ("conv1", 3, 8),
        ("conv2", 3, 4),
        ("fc", None, None),
    ]
    # The first ReLU's output has 8 bits for the sum, and 4 for conv2.
    assert diagnosis.activations == {4: 2, 8: 3}
    assert (diagnosis.batch_norms, diagnosis.folded) == (2, 2)
    assert "2 of 3 layers quantized" in diagnosis.summary()


def test_quantized_bytes_are_near_the_size_of_the_file(tmp_path: Path) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()) * 4,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    ).eval()
    example = torch.zeros(1, 32, 8, 8)
    recipe = find_recipe("fast").with_steps(4)
    diagnosis = diagnose(capture(model, example), FULL, recipe)
    data = torch.randn(64, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    quantized = gdfq.quantize(model, example, "w4a4", "real", data=data, steps=4)
    written = quantized.export(tmp_path / "q.onnx").bytes
    assert 0.75 < diagnosis.quantized_bytes / written < 1.1


def test_summary_names_floating_point_grids() -> None:
    scheme = Scheme(Bits.parse("w4afp8"), "full")
    diagnosis = diagnose(networks.captured("Residual"), scheme, find_recipe("fast"))
    assert (
        f"activations: {diagnosis.activations[8]} at 8 floating-point bits;" in diagnosis.summary()
    )


def test_problems_are_returned_and_not_raised() -> None:
    teacher = capture(networks.make("Transformer"), torch.zeros(1, 1, 8, 8))
    diagnosis = diagnose(teacher, Scheme(Bits(4, 4), "relu"), find_recipe("fast"))
    assert len(diagnosis.problems) == 2
    assert "of which this network has none" in diagnosis.problems[0]
    assert "Use recipe 'patches'" in diagnosis.problems[1]
    assert with_costs(diagnosis, teacher, FULL, find_recipe("fast")).seconds is None


def test_networks_of_8_bits_need_no_advice() -> None:
    teacher = networks.captured("Branches")
    assert diagnose(teacher, Scheme(Bits(8, 8), "full"), find_recipe("fast")).advice == ()


def test_diagnosis_says_what_stays_float_of_unusual_networks() -> None:
    def found(name: str) -> tuple[tuple[FloatOperators, ...], str]:
        teacher = capture(unusual.make(name), torch.zeros(1, *unusual.SHAPE))
        diagnosis = diagnose(teacher, FULL, find_recipe("fast"))
        assert not diagnosis.problems
        return diagnosis.float_operators, " ".join(diagnosis.advice)

    assert found("lstm")[0] == (FloatOperators("lstm", 1, NO_FORM),)
    assert FloatOperators("gru", 1, NO_FORM) in found("gru")[0]
    operators, advice = found("batch statistics")
    assert FloatOperators("group_norm", 1, NO_FORM) in operators
    assert "depend on the other images of its batch" in advice
    assert "depend on the other images" not in found("norms")[1]
