"""The table of other toolkits, and the network that one of them is given."""

from typing import Any

import torch
from benchmarks import paired, peer, peers_224
from torch import Tensor, nn
from torch.nn import functional as F


class Padded(nn.Conv2d):
    """A convolution that pads beforehand, as those of EfficientNet-Lite do."""

    def __init__(self, channels: int, stride: int, padding: nn.Module) -> None:
        super().__init__(channels, channels, 3, stride, groups=channels)
        self.static_padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride, groups=4)


def test_plain_convolutions_compute_what_padded_ones_do() -> None:
    model = nn.Sequential(
        Padded(4, 2, nn.ZeroPad2d((0, 1, 0, 1))), nn.ReLU(), Padded(4, 1, nn.Identity())
    ).eval()
    plain = peer.with_plain_convolutions(model)
    images = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain(images), model(images))
    found = [module for module in plain.modules() if isinstance(module, nn.Conv2d)]
    assert {type(module) for module in found} == {nn.Conv2d}


def row(method: str, right: list[bool], **more: object) -> dict[str, Any]:
    share = 100 * sum(right) / len(right)
    part = {"teacher": {"all": 75.0}, "student": {"all": share}, "drop_interval": [0.0, 50.0]}
    return {
        "network": "efficientnet_lite0",
        "bits": "w8a8",
        "seed": 0,
        "method": method,
        **part,
        "others": part,
        "images_tested": 4,
        "right": paired.packed(torch.tensor(right)),
        "seconds": 2.0,
        "cpu_seconds": 3.0,
        "peak_mib": 1500,
        "threads": 2,
        **more,
    }


def test_table_says_by_how_much_gdfq_is_better() -> None:
    rows = [
        row("static-real", [True, False, False, False]),
        row("gdfq", [True, True, False, True], bytes=2048, same_answers=100.0),
    ]
    ours, theirs = peers_224.table(rows).splitlines()[-2:]
    start = "| efficientnet_lite0 (75.00) | w8a8 | 0 |"
    end = "| 2 (3) | 1,500 | 2 | 100.0 % |"
    assert ours == f"{start} gdfq `quick` | 75.00 | 0.00 (0.00 to 50.00) | 0.00 |  {end}"
    assert "| 25.00 | 50.00 (0.00 to 50.00) | 50.00 | 50.00 (0.00 to 100.00) |" in theirs


def test_table_says_why_a_toolkit_was_not_measured() -> None:
    facts = {"network": "efficientnet_lite0", "bits": "w4a8", "seed": 1, "method": "mct"}
    (*_, line) = peers_224.table([facts | {"skipped": "it does not import"}]).splitlines()
    assert line.startswith("| efficientnet_lite0 | w4a8 | 1 | `mct`, its own images | not measured")
    assert line.count("|") == peers_224.table([facts | {"skipped": ""}]).splitlines()[-3].count("|")
