"""Adam on a student with learned quantizers."""

from dataclasses import dataclass

import torch
from torch import nn

from gdfq.files.plain_values import tagged
from gdfq.quantizers.base import ActivationQuantizer, WeightQuantizer


@tagged(
    "GridAdam",
    renamed={
        "code_lr": "codes",
        "scale_lr": "steps",
        "other_lr": "others",
        "rounding_lr": "roundings",
    },
)
@dataclass(frozen=True)
class GridAdam:
    """Adam on a student, with one learning rate, in its own unit, for each kind of parameter.

    Attributes:
        code_lr: Learning rate of the latent codes of weights, in codes per update.
        scale_lr: Learning rate of the logarithms of scales.
        other_lr: Learning rate of biases and all other parameters, absolute.
        rounding_lr: Learning rate of the logits of learned rounding.
    """

    code_lr: float
    scale_lr: float
    other_lr: float
    rounding_lr: float = 0.0

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of all parameters of a module."""
        by_name = {
            "codes": self.code_lr,
            "rounding_logits": self.rounding_lr,
            "log_scale": self.scale_lr,
        }
        rates: dict[nn.Parameter, float] = {
            parameter: by_name.get(name, self.other_lr)
            for quantizer in module.modules()
            if isinstance(quantizer, WeightQuantizer | ActivationQuantizer)
            for name, parameter in quantizer.named_parameters()
        }
        by_rate: dict[float, list[nn.Parameter]] = {}
        for parameter in module.parameters():
            by_rate.setdefault(rates.get(parameter, self.other_lr), []).append(parameter)
        return torch.optim.Adam(
            [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
        )
