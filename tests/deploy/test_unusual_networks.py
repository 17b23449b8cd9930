"""Unusual networks are saved, loaded and exported to all targets; runtimes agree with them."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support import networks, unusual
from torch import Tensor, nn

import gdfq
from gdfq.deploy.runtimes import onnx_runner, program_runner
from gdfq.graph.outputs import flattened
from gdfq.quantized import QuantizedNetwork

pytestmark = pytest.mark.check  # many networks: minutes

EXAMPLE = torch.zeros(1, *unusual.SHAPE)
CHAINS = {
    "writes": ("typed", "writes", "fills", "shifts", "interleaves", "by batch index"),
    "operators": ("unfold", "fold", "grid sample", "nearest exact", "antialiased", "choices"),
    "max unpooling": ("max unpooling", "random leaky relu"),
    "generalized mean": ("generalized mean",),
    "roots": ("power mean", "unit length", "cosine"),
    "in place": ("in place", "counts images", "clips"),
    "norms": ("norms", "rms norm", "batch statistics", "mask of infinity"),
    "precisions": ("double inside", "autocast", "half inside", "tied"),
    "recurrent": ("lstm", "gru", "rnn", "rnn of tanh"),
    "states": ("sequence first", "last states", "lstm cell", "gru cell"),
}
"""Networks whose middles are tried together, because each export takes seconds."""


def quantized(network: nn.Module) -> QuantizedNetwork:
    data = networks.images(32, seed=4, shape=unusual.SHAPE)
    return gdfq.quantize(network, EXAMPLE, "w7a8", "real", data=data, steps=4, batch=16)


def error_of(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


RUNNERS = {"onnx": onnx_runner, "pt2": program_runner}


def check_files(
    student: QuantizedNetwork, folder: Path, kinds: Sequence[str] = ("onnx", "pt2", "safetensors")
) -> None:
    """Save, load and export a network, and compare shapes for several numbers of images."""
    student.save(folder)
    loaded = gdfq.load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in kinds:  # other runtimes lack some operators
            exported = student.export(folder / f"file.{kind}")
            # A sum may round to the other of two codes that are equally near.
            assert exported.inside.relative_error < 0.01
    runs = [
        RUNNERS[kind]((folder / f"file.{kind}").read_bytes()) for kind in kinds if kind in RUNNERS
    ]
    for count in (1, 2, 5):
        x = networks.images(count, seed=count, shape=unusual.SHAPE)
        expected = flattened(student(x))
        for actual, same in zip(flattened(loaded(x)), expected, strict=True):
            assert torch.equal(actual, same)
        for run in runs:
            for actual, same in zip(run(x), expected, strict=True):
                assert actual.shape == same.shape
                assert len(actual) == count


@pytest.mark.parametrize("name", CHAINS)
def test_unusual_network_runs_from_its_files(name: str, tmp_path: Path) -> None:
    network = unusual.chain(*CHAINS[name])
    student = quantized(network)
    x = networks.images(16, seed=5, shape=unusual.SHAPE)
    with torch.no_grad():
        assert error_of(student(x), network(x)) < 0.1
    check_files(student, tmp_path, ("onnx", "safetensors"))


@pytest.mark.parametrize("name", CHAINS)
def test_unusual_network_runs_as_a_program(name: str, tmp_path: Path) -> None:
    check_files(quantized(unusual.chain(*CHAINS[name])), tmp_path, ("pt2",))


def test_layers_of_any_name_run_from_every_kind_of_file(tmp_path: Path) -> None:
    student = quantized(unusual.named(*unusual.NAMES))
    assert len(student.network.layers) == len(unusual.NAMES)
    assert all(layer.bits == 7 for layer in student.network.layers)
    check_files(student, tmp_path)


class Parent(nn.Conv2d):
    """A convolution with submodules of the names that its own constants have."""

    def __init__(self) -> None:
        super().__init__(3, 8, 3)
        for name in ("scale", "codes", "zero_point", "folded_weight", "folded_bias"):
            setattr(self, name, nn.Conv2d(8, 8, 1))
        self.own_norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own_norm(super().forward(x))
        for name in ("scale", "codes", "zero_point", "folded_weight", "folded_bias"):
            x = getattr(self, name)(torch.relu(x))
        return x


def test_layers_inside_a_layer_run_from_every_kind_of_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = (Parent(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    check_files(quantized(unusual.ready(nn.Sequential(*parts))), tmp_path)


def test_tied_convolutions_have_a_scale_for_each_output_channel_of_each(tmp_path: Path) -> None:
    """An autoencoder whose decoder is the transpose of its encoder, beside one with a copy."""
    errors = []
    for copied in (True, False):
        network = unusual.tied_autoencoder(copied)
        student = quantized(network)
        scales = [tuple(weight.scale.shape) for weight in student.network.weights]
        assert scales == [(6, 1, 1, 1), (16, 1, 1, 1), (1, 6, 1, 1)]
        x = networks.images(16, seed=5, shape=unusual.SHAPE)
        with torch.no_grad():
            errors.append(error_of(student(x), network(x)))
    assert errors[1] == pytest.approx(errors[0], rel=0.15)
    check_files(student, tmp_path)


class Tokens(nn.Module):
    """Token ids [N, 6] -> logits [N, 20]; the embedding is the last layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.relu(self.mix(self.embed(ids))).mean(1))


def test_embedding_shares_its_weight_with_a_linear_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, data = Tokens().eval(), {"ids": torch.randint(20, (32, 6))}
    student = gdfq.quantize(network, data, "w8a8", "real", data=data, steps=4, batch=16)
    with torch.no_grad():
        assert error_of(student(**data), network(**data)) < 0.05
    assert [tuple(weight.scale.shape) for weight in student.network.weights] == [(8, 1), (20, 1)]
    student.save(tmp_path)
    assert torch.equal(gdfq.load(tmp_path)(**data), student(**data))
    assert student.export(tmp_path / "tokens.onnx").inside.relative_error < 1e-5


def test_pruned_weights_stay_zero() -> None:
    network = unusual.make("pruned")
    student = quantized(network)
    weight = student.network.weights[0]
    is_zero = weight.codes == weight.zero_point
    assert float(is_zero.float().mean()) >= 0.5


class Ages(unusual.Network):
    """One number for each image, [N]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :1].squeeze(1)


class Squeezed(unusual.Network):
    """squeeze() removes the dimension of a batch of one, too."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(torch.relu(self.norm(self.conv(x))), 1)
        return self.head(x.squeeze())


class Several(unusual.Network):
    """A number for each image beside its logits."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return {"logits": logits, "sure": logits.softmax(1).amax(1), "one": logits[:, :1]}


@pytest.mark.parametrize(("kind", "shape"), [(Ages, ()), (Squeezed, (5,)), (Several, None)])
def test_outputs_have_an_entry_for_each_image_in_every_file(
    kind: type[unusual.Network], shape: tuple[int, ...] | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    student = quantized(unusual.ready(kind()))
    check_files(student, tmp_path)
    if shape is not None:
        for count in (1, 3):
            x = networks.images(count, shape=unusual.SHAPE)
            assert student(x).shape == (count, *shape)


def test_accuracy_is_measured_on_a_last_batch_of_one_image() -> None:
    torch.manual_seed(0)
    student = quantized(unusual.ready(Squeezed()))
    images = torch.randint(256, (251, *unusual.SHAPE), dtype=torch.uint8)
    predicted = student(images / 255).argmax(1)
    labels = torch.where(torch.arange(251) < 100, predicted, (predicted + 1) % 5)
    assert student.evaluate((images, labels)) == pytest.approx(100 * 100 / 251)
    assert student.evaluate((images[:1], labels[:1])) == 100
