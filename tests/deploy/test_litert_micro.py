"""Files for TFLite Micro: every code, in its interpreter and in LiteRT's reference kernels."""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import networks
from support.small_runs import quantized_by_fast
from support.surrounded import Of, surrounded, teacher_of
from torch import nn

from gdfq import GdfqError, UsageError
from gdfq.deploy.litert.carriers import carriers_of
from gdfq.deploy.litert.flatbuffer import schema
from gdfq.deploy.litert_micro import target as micro
from gdfq.deploy.litert_micro.arithmetic import headroom
from gdfq.deploy.litert_micro.operators import unsupported
from gdfq.deploy.litert_micro.outputs import with_output_grids
from gdfq.deploy.litert_micro.simulation import Simulated, simulated
from gdfq.deploy.target import Job
from gdfq.functional.grid import Bits
from gdfq.graph.ends import output_names
from gdfq.quantized import QuantizedNetwork
from gdfq.student.scheme import Scheme

needs_litert = pytest.mark.skipif(
    importlib.util.find_spec("ai_edge_litert") is None,
    reason="needs the optional library ai_edge_litert",
)
needs_micro = pytest.mark.skipif(
    importlib.util.find_spec("tflite_micro") is None,
    reason="needs the optional library tflite_micro",
)
SHAPE = (3, 9, 7)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "strided": lambda: nn.Conv2d(8, 8, 3, 2, 1),
    "uneven": lambda: nn.Conv2d(8, 8, (3, 5), (2, 1), (0, 2)),
    "dilated": lambda: nn.Conv2d(8, 8, 3, 1, 2, 2),
    "grouped": lambda: nn.Conv2d(8, 12, 3, 1, 1, groups=4),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, 2, 1, groups=8),
    "depthwise_multiplied": lambda: nn.Conv2d(8, 16, 5, 1, 2, groups=8, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, 3, 2, 1, 1),
    "max_pool": lambda: nn.MaxPool2d(3, 2, 1),
    "avg_pool": lambda: nn.AvgPool2d(3, 2, 1),
    "avg_pool_divisor": lambda: nn.AvgPool2d(3, 2, divisor_override=5),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "channel_shuffle": lambda: nn.ChannelShuffle(4),
    "relu6": nn.ReLU6,
    "sequence": lambda: nn.Sequential(
        nn.Flatten(2), nn.Conv1d(8, 8, 3), nn.ReLU(), nn.AvgPool1d(2), nn.Unflatten(2, (15, 2))
    ),
    "residual": lambda: Of(lambda x: F.relu(x + x.roll(1, 2))),
    "difference": lambda: Of(lambda x: x - x.flip(3)),
    "product": lambda: Of(lambda x: x * x.amax((2, 3), keepdim=True)),
    "cat": lambda: Of(lambda x: torch.cat([x, x - x.flip(2)], 1)),
    "sliced": lambda: Of(lambda x: x[:, 1:7, ::2, 1:]),
}


@pytest.mark.check
@needs_litert
@needs_micro
@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w3a4"])
@pytest.mark.parametrize("name", LAYERS)
def test_micro_operator_has_the_codes_of_the_simulation(
    name: str, bits: str, tmp_path: Path
) -> None:
    """The export compares every code in TFLite Micro, on usual and on extreme inputs."""
    quantized = quantized_by_fast(surrounded(LAYERS[name](), SHAPE), bits, "full", SHAPE)
    exported = quantized.export(tmp_path / "net.micro.tflite")
    assert exported.target == "litert-micro"
    assert exported.inside.relative_error < 0.1


@pytest.mark.check
@needs_litert
@needs_micro
@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", ["Residual", "Branches", "Shared", "Standardised", "Segmenter"])
def test_micro_file_of_every_integer_network_is_kept(name: str, bits: str, tmp_path: Path) -> None:
    quantized = quantized_by_fast(networks.captured(name), bits, "full", networks.shape_of(name))
    path = tmp_path / "net.micro.tflite"
    exported = quantized.export(path)
    assert exported.inside.relative_error < (0.02 if bits == "w8a8" else 0.1)


def _job(quantized: QuantizedNetwork, path: Path) -> Job:
    names = tuple(output_names(quantized.card, quantized.ends))
    return Job(quantized.whole, quantized.card, path, quantized.examples, outputs=names)


def _reference_codes(data: bytes, codes: list[np.ndarray[Any, Any]]) -> dict[str, Any]:
    """All tensors that LiteRT's reference kernels write, which round twice like TFLite Micro's."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        model_content=data,
        experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
        experimental_preserve_all_tensors=True,
    )
    interpreter.allocate_tensors()
    (given,) = interpreter.get_input_details()
    found: dict[str, list[Any]] = {}
    for one in codes:
        interpreter.set_tensor(given["index"], one)
        interpreter.invoke()
        for detail in interpreter.get_tensor_details():
            if detail["dtype"] == np.int8 and detail["name"].endswith((".q", "logits")):
                found.setdefault(detail["name"], []).append(interpreter.get_tensor(detail["index"]))
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


@needs_litert
@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", ["Residual", "Branches"])
def test_micro_file_has_the_codes_of_reference_kernels(
    name: str, bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without TFLite Micro: the same check with LiteRT's kernels of the same arithmetic."""
    quantized = quantized_by_fast(networks.captured(name), bits, "full")
    job = _job(quantized, tmp_path / "net.micro.tflite")
    job.path.write_bytes(micro.LITERT_MICRO.write(job))
    simulations: list[Simulated] = []

    def simulate(*given: Any) -> Simulated:
        simulations.append(simulated(*given))
        return simulations[-1]

    def values(change: int, data: bytes, inputs: Any) -> dict[str, Any]:
        """LiteRT's linear layers round once, so the outputs are the simulation's."""
        found = _reference_codes(data, inputs[0])
        (zero_point,) = (d for n, d in _zero_points(data).items() if n == "logits")
        expected = simulations[-1].outputs[0].numpy() + zero_point
        assert np.abs(expected - found["logits"]).max() <= 1
        return {**found, "logits": expected + change}

    monkeypatch.setattr(micro, "simulated", simulate)
    monkeypatch.setattr(micro, "micro_values", partial(values, 0))
    proof = micro.LITERT_MICRO.prove(job, job.path)
    assert proof.inside.relative_error < 0.1
    notes = micro.LITERT_MICRO.notes(job, b"", proof)
    step = "0.0308" if bits == "w8a8" else "0.0258"  # at w8a8 it reaches 1.2 times as far
    assert notes[0].startswith(f"input 'x' is int8: round(x / {step}")
    monkeypatch.setattr(micro, "micro_values", partial(values, 1))
    with pytest.raises(GdfqError, match=r"others are: 100\.00% of 'logits'\."):
        micro.LITERT_MICRO.prove(job, job.path)


def _zero_points(data: bytes) -> dict[str, int]:
    (graph,) = schema().ModelT.InitFromPackedBuf(data).subgraphs
    return {
        tensor.name.decode(): int(tensor.quantization.zeroPoint[0])
        for tensor in graph.tensors
        if tensor.quantization is not None
    }


def test_micro_refuses_float_operators_before_the_run() -> None:
    teacher = networks.captured("Preactivation")
    with pytest.raises(UsageError, match=r"batch_norm \(batch_norm\), silu \(silu\), sigmoid"):
        micro.LITERT_MICRO.check_scheme(teacher, Scheme(Bits(8, 8), "full"))
    residual = networks.captured("Residual")
    micro.LITERT_MICRO.check_scheme(residual, Scheme(Bits(4, 4), "full"))
    with pytest.raises(UsageError, match="needs placement full"):
        micro.LITERT_MICRO.check_scheme(residual, Scheme(Bits(4, 4), "relu"))


def test_micro_names_operators_without_an_integer_form() -> None:
    modules = (
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.ConvTranspose2d(8, 8, 3, 1, 1, groups=2),
        nn.Hardtanh(-0.5, 0.7),
        nn.BatchNorm2d(8),
        Of(lambda x: x + 0.5),
        Of(lambda x: x * torch.linspace(1, 2, 8).view(8, 1, 1)),
        nn.ZeroPad2d((0, 1, 0, 1)),
        nn.PixelUnshuffle(2),
        nn.AdaptiveAvgPool2d((3, 3)),
    )
    refused = unsupported(surrounded(nn.Sequential(*modules), SHAPE).network.graph)
    kinds = [text.rpartition("(")[2].removesuffix(")") for text in refused]
    operators = "avg_pool2d conv_transpose2d hardtanh batch_norm add mul pixel_unshuffle"
    assert kinds == [*operators.split(), "adaptive_avg_pool2d"]
    assert refused[1].startswith("inner.1 ")


def test_headroom_fits_int8_and_the_bias() -> None:
    quantized = quantized_by_fast(networks.captured("Residual"), "w3a4", "full")
    for layer in quantized.network.layers:
        assert layer.weight is not None
        factor = headroom(layer)
        largest = float((layer.weight.codes - layer.weight.zero_point).abs().max())
        assert largest * factor <= 127 < 2 * largest * factor or factor == 64


def test_simulation_rounds_twice(small: QuantizedNetwork) -> None:
    """The first convolution, computed with Python's whole numbers."""
    network, grids = with_output_grids(small.network, ["logits"], [torch.tensor([-1.0, 2.0])])
    assert grids == ["logits"]
    images = small.examples[0][:2]
    found = simulated(network, [images])
    layer, (given, result, *_) = network.layers[0], network.activations
    assert layer.weight is not None
    assert layer.bias is not None
    u = found.codes[given.name][1, :, 2:5, 3:6].long()
    v = ((layer.weight.codes - layer.weight.zero_point)[4]).long()
    larger = headroom(layer)
    total = int((u * v).sum() + layer.bias[4]) * larger
    factor = float(given.scale) * float(layer.weight.scale.flatten()[4]) / larger
    factor /= float(result.scale)
    shift = 0
    while factor < 0.5:
        factor, shift = factor * 2, shift + 1
    first = (total * int(factor * 2**31 + 0.5) + 2**30) >> 31
    second = (abs(first) + (2**shift >> 1)) >> shift
    expected = second if first >= 0 else -second
    top = 2**result.bits - 1
    assert found.codes[result.name][1, 4, 3, 4] == min(max(expected, 0), top)


@needs_litert
def test_micro_file_ends_before_a_softmax(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(140, 5))
    quantized = quantized_by_fast(teacher_of(nn.Sequential(network, nn.Softmax(1)), SHAPE), "w8a8",
                                  "full", SHAPE)  # fmt: skip
    job = _job(quantized, tmp_path / "net.micro.tflite")
    assert job.outputs == ("probabilities",)
    data = micro.LITERT_MICRO.write(job)
    assert b"SOFTMAX" not in data
    subject = micro._subject(job)
    assert subject.names == ["logits"]
    assert [carriers_of(subject.network)[name].bits for name in subject.grids] == [8]
