"""The embedded demonstration: handwritten digits (scikit-learn's, real images).

A small network is trained on one half of the images, the images are thrown away, and the network
is quantized from its weights alone: by rounding, by GDFQ as published, and by `fast`. The other
half tells what that cost.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdfq.data.preprocessing import Preprocessing
from gdfq.errors import UsageError
from gdfq.execution.seeding import stream
from gdfq.recipes import PAPER, find_recipe
from gdfq.sources.generator import GeneratorSource

INPUT_SHAPE = (1, 8, 8)
PREPROCESSING = Preprocessing(mean=(0.305,), std=(0.376,))  # of the training half

RECIPE = replace(PAPER, source=GeneratorSource(batch=64)).with_steps(1000)
"""GDFQ as published, at a batch that a minute allows."""
ROUNDING = replace(find_recipe("round"), source=RECIPE.source).with_steps(RECIPE.calibration)


@dataclass(frozen=True)
class Digits:
    """One half of the digits: images uint8 [N, 1, 8, 8], labels [N]."""

    images: Tensor
    labels: Tensor


def load_digits() -> tuple[Digits, Digits]:
    """Training half (even indices) and test half (odd indices); needs scikit-learn."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise UsageError(
            "the demonstration needs scikit-learn, which ships the digits. "
            "Install it with: pip install 'gdfq[demo]'"
        ) from error
    raw = load()
    pixels = np.round(raw.images * (255 / 16)).astype(np.uint8)
    images, labels = torch.from_numpy(pixels)[:, None], torch.from_numpy(raw.target).long()
    return Digits(images[::2], labels[::2]), Digits(images[1::2], labels[1::2])


def _layer(inputs: int, width: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Module:
    convolution = nn.Conv2d(inputs, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def _separable(inputs: int, width: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        _layer(inputs, inputs, 3, stride=stride, groups=inputs), _layer(inputs, width, 1)
    )


class DigitsNetwork(nn.Module):
    """A small MobileNet, the kind that is hard to quantize: [N, 1, 8, 8] -> logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _layer(1, 16, 3)
        self.stage1 = nn.Sequential(_separable(16, 32), _separable(32, 32))
        self.stage2 = nn.Sequential(_separable(32, 64, stride=2), _separable(64, 64))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def train(
    digits: Digits,
    *,
    epochs: int = 40,
    seed: int = 0,
    loss_function: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> nn.Module:
    """A DigitsNetwork trained on the digits, in evaluation mode; takes seconds.

    Args:
        digits: Images and labels to train on.
        epochs: Passes over them.
        seed: Of the first weights, the order and the shifts of the images.
        loss_function: Loss of logits [N, 10] and labels [N].
    """
    random = stream(seed, "demo")
    network = DigitsNetwork()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter, generator=random)
        network.head.bias.zero_()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * -(-len(digits.labels) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    images = PREPROCESSING(digits.images)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=random).split(64):
            shift = torch.randint(-1, 2, (2,), generator=random).tolist()
            batch = images[chosen].roll(shift, (2, 3))
            loss = loss_function(network(batch), digits.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()
