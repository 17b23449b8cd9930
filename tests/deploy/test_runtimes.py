"""What ONNX Runtime computes in float."""

from pathlib import Path

import pytest
import torch
from support.choice import checked
from torch import Tensor, nn

import gdfq
from gdfq.deploy.runtimes import computed_in_float


class _Mobile(nn.Module):
    """Convolutions, depthwise ones too, with ReLU6, clamp and hardtanh, whose ends are used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(*channels, 3, 1, 1, groups=groups), nn.BatchNorm2d(channels[1]))
            for channels, groups in (((3, 16), 1), ((16, 16), 16), ((16, 16), 1), ((16, 16), 16))
        )
        for layer in self.layers:
            norm = layer.get_submodule("1")
            assert isinstance(norm, nn.BatchNorm2d)
            nn.init.constant_(norm.weight, 4.0)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth = self.layers
        x = nn.functional.relu6(first(x))
        x = nn.functional.relu6(second(x))
        x = third(x).clamp(0, 5)
        x = nn.functional.hardtanh(fourth(x), 0, 6)
        return self.last(x.mean((2, 3)))


@pytest.mark.parametrize("bits", ["w8a8", checked("w4a8")])
def test_tuned_relu6_network_has_no_float_convolution(bits: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = _Mobile().train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(16, 3, 12, 12))
    quantized = gdfq.quantize(network.eval(), torch.zeros(1, 3, 12, 12), bits, "quick", steps=20)
    quantized.export(tmp_path / "s.onnx")
    found = computed_in_float((tmp_path / "s.onnx").read_bytes())
    assert not [name for name, kind in found if "Conv" in kind or "Clip" in kind]
