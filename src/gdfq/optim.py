"""Optimizers and learning-rate schedules as frozen values."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from gdfq.files.plain_values import tagged


@tagged("SgdConfig")
@dataclass(frozen=True)
class SgdConfig:
    """Stochastic gradient descent with Nesterov momentum on all parameters of a module.

    Attributes:
        lr: Learning rate.
        momentum: Nesterov momentum.
        weight_decay: Factor of the L2 penalty.
    """

    lr: float
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            module.parameters(),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=True,
        )


@tagged("AdamConfig")
@dataclass(frozen=True)
class AdamConfig:
    """Adam (arXiv 1412.6980).

    Attributes:
        lr: Learning rate.
        betas: Decay rates β₁ and β₂ of the averages.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)

    def build(self, parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr, betas=self.betas)


class OptimizerConfig(Protocol):
    """Which optimizer trains a module."""

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of all parameters of a module."""
        ...


class Schedule(Protocol):
    """The learning rate over the steps."""

    def factor(self, step: int, total: int) -> float:
        """Return the factor on the initial learning rate at `step` (from 0) out of `total`."""
        ...


@tagged("StepDecay")
@dataclass(frozen=True)
class StepDecay:
    """Multiplies the learning rate by `decay` at each milestone, a fraction of all steps.

    The published milestones are epochs 100, 200 and 300 of 400.
    """

    milestones: tuple[float, ...] = (0.25, 0.5, 0.75)
    decay: float = 0.1

    def factor(self, step: int, total: int) -> float:
        passed = sum(step >= round(milestone * total) for milestone in self.milestones)
        return self.decay**passed


@tagged("Cosine")
@dataclass(frozen=True)
class Cosine:
    """Half a cosine from 1 to 0, times a line from 0 to 1 over the fraction `warmup` of the steps.

    Adam's first updates are as large as its rate whatever the gradient, in all weights at once.
    """

    warmup: float = 0.0

    def factor(self, step: int, total: int) -> float:
        rise = min(1.0, (step + 1) / (self.warmup * total)) if self.warmup else 1.0
        return rise * 0.5 * (1 + math.cos(math.pi * step / total))


def set_rate_(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of each parameter group to `factor` times its initial one."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
