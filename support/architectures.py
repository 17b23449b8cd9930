"""Architectures of libraries and small networks, and the whole method on one of them.

Weights are random: they say nothing of accuracy, but whether a network of this shape passes.
"""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from support import networks
from torch import nn

import gdfq
from gdfq.errors import GdfqError
from gdfq.graph import queries
from gdfq.graph.capture import Captured, capture
from gdfq.graph.tensors import tensors_of
from gdfq.models.registry import RANDOM, load_model
from gdfq.recipes import FAST, Recipe
from gdfq.sources.base import Source
from gdfq.sources.generator import GeneratorSource
from gdfq.sources.patches import PatchSource
from gdfq.sources.spectral import SpectralSource


@dataclass(frozen=True)
class Entry:
    """An architecture and the shape of its input here, smaller than its own where possible."""

    spec: str
    shape: tuple[int, ...] = (3, 64, 64)


LARGE = (3, 224, 224)
ENTRIES = (
    *(Entry(f"own:{name}", (3, 8, 8)) for name in (
        "Residual", "Branches", "Shared", "Transposed", "Preactivation", "Standardised", "Tokens",
        "Shuffled", "Detector", "Segmenter",
    )),
    Entry("own:Transformer", (1, 8, 8)), Entry("own:Audio", (2, 64)), Entry("own:Volume", (1, 8, 8, 8)),
    Entry("ptcv:resnet20_cifar10", (3, 32, 32)), Entry("ptcv:preresnet20_cifar10", (3, 32, 32)),
    *(Entry(f"ptcv:{name}_cifar10", (3, 32, 32)) for name in (
        "nin", "seresnet20", "sepreresnet20", "densenet40_k12", "ror3_56", "rir", "shakeshakeresnet20_2x16d",
        "diaresnet20",
    )),
    *(Entry(f"timm:test_{name}", (3, 96, 96)) for name in (
        "byobnet", "convnext", "efficientnet", "efficientnet_gn", "nfnet", "resnet", "mambaout",
    )),
    Entry("timm:test_vit", (3, 160, 160)), Entry("torchvision:shufflenet_v2_x0_5"), Entry("timm:mobilenetv3_small_050"), Entry("timm:ghostnet_050"),
    Entry("torchvision:mnasnet0_5"), Entry("timm:mobilenetv2_050"), Entry("torchvision:mobilenet_v2"),
    Entry("torchvision:squeezenet1_1"), Entry("timm:regnetx_002"), Entry("timm:resnet18"),
    Entry("timm:resnet26d"), Entry("timm:resnext26ts"),
    Entry("torchvision:googlenet"), Entry("torchvision:inception_v3", (3, 96, 96)), Entry("timm:repvgg_a0"),
    Entry("timm:efficientnet_lite0"), Entry("timm:deit_tiny_patch16_224", LARGE), Entry("timm:convnext_atto"),
    Entry("ptcv:sqnxt23_w1", LARGE), Entry("torchvision:swin_t"),
    Entry("timm:vit_tiny_patch16_224", LARGE), Entry("torchvision:mobilenet_v3_large"), Entry("timm:efficientnet_b0"),
    Entry("torchvision:densenet121"), Entry("ptcv:wrn16_10_cifar10", (3, 32, 32)), Entry("timm:mobilenetv1_100"),
    Entry("timm:regnety_002"), Entry("ptcv:preresnet10"), Entry("timm:legacy_seresnet18"), Entry("torchvision:resnext50_32x4d"),
    Entry("timm:swin_tiny_patch4_window7_224", LARGE), Entry("torchvision:vgg16_bn", (3, 32, 32)),
    Entry("timm:mobilevit_xxs", (3, 128, 128)), Entry("timm:mobileone_s0"), Entry("timm:hardcorenas_a"), Entry("timm:fbnetc_100"),
    Entry("timm:levit_128s", LARGE), Entry("timm:xcit_nano_12_p16_224", LARGE), Entry("timm:mixer_s32_224", LARGE),
    Entry("timm:dla34"), Entry("timm:hrnet_w18_small"), Entry("timm:res2net50_14w_8s"), Entry("timm:darknetaa53"),
)  # fmt: skip


def own(name: str) -> nn.Module:
    """One of the small networks of the tests."""
    return networks.make(name)


def network(entry: Entry) -> nn.Module:
    hub, _, name = entry.spec.partition(":")
    return own(name) if hub == "own" else load_model(entry.spec, RANDOM).module


def recipe_for(teacher: Captured) -> Recipe:
    """`fast` with two updates, on a source that suits this network."""
    source: Source = GeneratorSource(batch=4)
    if not teacher.batch_norms:
        source = PatchSource(batch=4, iterations=2)
    elif len(teacher.input_shape) != 3:
        source = SpectralSource(batch=4, iterations=2)
    return replace(FAST, source=source, steps=4, calibration=2, warmup=2)


def passed(entry: Entry) -> dict[str, Any]:
    """The results of one architecture, or the error that stopped it."""
    started = time.perf_counter()
    row: dict[str, Any] = {"network": entry.spec, "input": "x".join(map(str, entry.shape))}
    model, example = network(entry), torch.zeros(1, *entry.shape)
    try:
        teacher = capture(model, example)
    except GdfqError as error:
        return {**row, "error": str(error)}
    nodes = list(teacher.network.graph.nodes)
    row |= {
        "parameters": sum(tensor.numel() for tensor in tensors_of(teacher.network).values()),
        "layers": sum(map(queries.has_weight, nodes)),
        "batch_norms": len(teacher.batch_norms),
        "outputs": len(queries.outputs(teacher.network.graph)),
        "capture_seconds": round(time.perf_counter() - started, 1),
    }
    recipe = recipe_for(teacher)
    for placement in ("relu", "full"):
        try:
            quantized = gdfq.quantize(teacher, example, "w4a4", recipe, placement=placement)
            quantized(torch.randn(2, *entry.shape))
            with tempfile.TemporaryDirectory() as folder:
                exported = quantized.export(Path(folder) / "student.onnx")
            row[placement] = {
                "kib": exported.bytes // 1024,
                "typical_error": exported.inside.typical_error,
                "beyond": None if exported.beyond is None else exported.beyond.typical_error,
            }
        except GdfqError as error:
            row[placement] = {"error": str(error)}
    return {**row, "seconds": round(time.perf_counter() - started, 1)}
