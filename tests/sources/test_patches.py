"""Images with diverse patches, for networks without batch norms."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import networks
from support.narrowing import instance, present
from support.students import transformer
from torch import nn

import gdfq
from gdfq import UsageError, demo
from gdfq.execution.context import Context
from gdfq.functional.losses import patch_entropy
from gdfq.graph import operators
from gdfq.graph.capture import Captured, capture
from gdfq.recipes import find_recipe
from gdfq.sources.patches import PatchSource, patch_nodes, patches
from gdfq.sources.pool import ImagePool

ZEROS = torch.zeros(1, *networks.Transformer.SHAPE)


@pytest.fixture(scope="module")
def small() -> Captured:
    return capture(transformer(), ZEROS)


def test_patch_entropy_matches_numpy() -> None:
    draw = np.random.default_rng(0)
    groups = draw.standard_normal((3, 5, 4))
    entropies = []
    for patches_ in groups:
        unit = patches_ / np.linalg.norm(patches_, axis=1, keepdims=True)
        pairs = [unit[i] @ unit[j] for i in range(5) for j in range(5) if i != j]
        points = np.linspace(-1.2, 1.2, 49)
        density = np.mean(
            [
                np.exp(-0.5 * ((p - points) / 0.1) ** 2) / 0.1 / math.sqrt(2 * math.pi)
                for p in pairs
            ],
            axis=0,
        )
        assert density.sum() * 0.05 == pytest.approx(1, abs=0.02)  # it is a density
        entropies.append(-(density * np.log(density + 1e-300)).sum() * 0.05)
    actual = patch_entropy(torch.from_numpy(groups))
    assert float(actual) == pytest.approx(np.mean(entropies), rel=1e-6)


def test_equal_patches_have_the_entropy_of_one_kernel() -> None:
    alike = torch.ones(2, 6, 3)
    one_kernel = math.log(0.1 * math.sqrt(2 * math.pi * math.e))
    assert float(patch_entropy(alike)) == pytest.approx(one_kernel, abs=0.03)
    assert patch_entropy(torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))) > 0


def test_patch_nodes_are_attentions_or_feature_maps(small: Captured) -> None:
    nodes = patch_nodes(small.network.graph)
    assert [operators.name_of(node) for node in nodes] == ["aten.matmul.default"] * 2
    value = torch.randn(2, 4, 17, 8)
    assert torch.equal(patches(nodes[0], value), value.flatten(0, 1))
    residual = networks.captured("Residual")
    (node, *_) = patch_nodes(residual.network.graph)
    value = torch.randn(2, 8, 16, 16)
    taken = patches(node, value)
    assert taken.shape == (2, 64, 8)
    assert torch.equal(taken[:, 1], value[:, :, 0, 4])


def test_patch_images_gain_entropy_and_keep_their_scale(small: Captured) -> None:
    source = PatchSource(batch=8, iterations=30)
    seen = []
    (batch,) = source.stream(
        small, steps=1, context=Context(listener=lambda step: seen.append(step.losses))
    )
    assert float(seen[-1]["entropy"]) > float(seen[0]["entropy"]) + 0.1
    assert batch.images.mean().abs() < 0.2
    assert abs(float(batch.images.std()) - 1) < 0.3
    assert present(batch.labels).tolist() == [
        0,
        2,
        4,
        6,
        8,
        1,
        3,
        5,
    ]  # of ten classes, from all over
    (again,) = source.stream(small, steps=1)
    assert torch.equal(again.images, batch.images)


def test_patch_source_refuses_networks_without_patches() -> None:
    vectors = capture(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.zeros(1, 6))
    with pytest.raises(UsageError, match="diversity of patches needs"):
        PatchSource().stream(vectors, steps=1)
    with pytest.raises(UsageError, match="this network has none"):
        gdfq.quantize(transformer(), ZEROS, recipe="fast")


@pytest.mark.check
def test_patches_keep_the_accuracy_of_a_transformer_at_eight_bits(tmp_path: Path) -> None:
    training, held_out = demo.load_digits()
    recipe = find_recipe("patches").with_steps(60)
    pool = instance(recipe.source, ImagePool)
    source = replace(instance(pool.source, PatchSource), iterations=20)
    recipe = replace(recipe, source=replace(pool, source=source, images=64))
    quantized = gdfq.quantize(
        networks.trained_transformer(demo.PREPROCESSING(training.images), training.labels),
        ZEROS,
        "w8a8",
        recipe,
        test=(held_out.images, held_out.labels),
        mean=demo.PREPROCESSING.mean,
        std=demo.PREPROCESSING.std,
    )
    full, low = (quantized.metrics[who]["top1"] for who in ("teacher", "student"))
    assert full > 85
    assert low > full - 0.5
    quantized.save(tmp_path)
    x = demo.PREPROCESSING(held_out.images[:20])
    assert torch.equal(gdfq.load(tmp_path)(x), quantized(x))
