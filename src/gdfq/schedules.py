"""Optimizers and learning-rate schedules as frozen values."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class SgdConfig:
    """Stochastic gradient descent with Nesterov momentum."""

    lr: float
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=True,
        )


@dataclass(frozen=True)
class AdamConfig:
    """Adam (arXiv 1412.6980)."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)

    def build(self, parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr, betas=self.betas)


@dataclass(frozen=True)
class StepDecay:
    """The learning rate times `factor` at each milestone, a part of all steps.

    The published milestones are epochs 100, 200 and 300 of 400.
    """

    milestones: tuple[float, ...] = (0.25, 0.5, 0.75)
    factor: float = 0.1

    def apply_(self, optimizer: torch.optim.Optimizer, base: float, step: int, total: int) -> None:
        """Set the learning rate of `step` (from 0) out of `total`."""
        passed = sum(step >= round(milestone * total) for milestone in self.milestones)
        for group in optimizer.param_groups:
            group["lr"] = base * self.factor**passed
