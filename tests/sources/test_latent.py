"""Images from optimised latents."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from support import networks
from support.narrowing import present

from gdfq.execution.context import Context
from gdfq.execution.progress import Step
from gdfq.graph.capture import Captured, capture
from gdfq.optim import AdamConfig
from gdfq.sources.latent import LatentSource, swinging


def test_latents_and_generator_reduce_the_statistics_loss(teacher: Captured) -> None:
    source = LatentSource(batch=16, iterations=30)
    heard: list[Step] = []
    first, second = source.stream(teacher, steps=2, context=Context(listener=heard.append))
    assert first.images.shape == (16, *networks.SHAPE)
    assert float(heard[29].losses["bns"]) < 0.7 * float(heard[0].losses["bns"])
    assert torch.equal(present(first.labels), teacher.network(first.images).argmax(1))
    assert not torch.equal(first.images, second.images)
    (still,) = replace(source, latents=AdamConfig(lr=0.0)).stream(teacher, steps=1)
    assert not torch.allclose(first.images, still.images)  # latents learn too
    (again,) = source.stream(teacher, steps=1)
    assert torch.equal(first.images, again.images)


def test_swing_shifts_inputs_of_strided_convolutions_only() -> None:
    strided = torch.nn.Conv2d(1, 1, 2, stride=2, bias=False)
    plain = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
    strided.weight.data.fill_(1)
    network = torch.nn.Sequential(plain, strided, torch.nn.Flatten())
    teacher = capture(network, torch.zeros(1, 1, 8, 8))
    x = torch.randn(1, 1, 8, 8)
    swung = swinging(teacher, torch.Generator().manual_seed(0))
    outputs = {tuple(swung.network(x)[0].tolist()) for _ in range(60)}
    assert len(outputs) == 9  # offsets −1, 0, 1 along each axis
    inner = plain(x).detach()
    padded = F.pad(inner, [1] * 4, mode="reflect")
    windows = {
        tuple(strided(padded[:, :, i : i + 8, j : j + 8]).flatten().tolist())
        for i in range(3)
        for j in range(3)
    }
    assert {tuple(round(v, 4) for v in o) for o in outputs} == {
        tuple(round(v, 4) for v in w) for w in windows
    }
