"""The networks whose weights the benchmarks use, as factories: `support/real_networks.py:NAME`.

Each is written to match the published state dicts that are named beside it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: option A of the ResNet paper, or a 1×1 convolution."""

    def __init__(self, inputs: int, width: int, stride: int, projects: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.extra = stride, width - inputs
        if projects and (stride != 1 or self.extra):
            convolution = nn.Conv2d(inputs, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        elif self.stride != 1 or self.extra:
            half = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet of 6n + 2 layers for 32×32 images."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self, n: int, classes: int, *, projects: bool = False, head: str = "linear"
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        width = 16
        for stage, (out, stride) in enumerate(((16, 1), (32, 2), (64, 2)), start=1):
            blocks = [BasicBlock(width, out, stride, projects)]
            blocks += [BasicBlock(out, out, 1, projects) for _ in range(n - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            width = out
        self.head = head
        self.add_module(head, nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.get_submodule(self.head)(x.mean((2, 3)))


class MobileNetV1(nn.Module):
    """MobileNetV1 x0.25 for 224×224 images."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()

        def conv(i: int, o: int, s: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

        def dw(i: int, o: int, s: int = 1) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(i, i, 3, s, 1, groups=i, bias=False),
                nn.BatchNorm2d(i),
                nn.ReLU(),
                nn.Conv2d(i, o, 1, bias=False),
                nn.BatchNorm2d(o),
                nn.ReLU(),
            )

        self.stage1 = nn.Sequential(
            conv(3, 8, 2), dw(8, 16), dw(16, 32, 2), dw(32, 32), dw(32, 64, 2), dw(64, 64)
        )
        self.stage2 = nn.Sequential(dw(64, 128, 2), *[dw(128, 128) for _ in range(5)])
        self.stage3 = nn.Sequential(dw(128, 256, 2), dw(256, 256))
        self.fc = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def cifar10_resnet20() -> nn.Module:
    """akamaster/pytorch_resnet_cifar10."""
    return CifarResNet(3, 10)


def cifar10_resnet32() -> nn.Module:
    """akamaster/pytorch_resnet_cifar10."""
    return CifarResNet(5, 10)


def cifar100_resnet56() -> nn.Module:
    """csyhhu/MetaQuant."""
    return CifarResNet(9, 100, projects=True, head="fc")


def imagenet_mobilenetv1_025() -> nn.Module:
    """biubug6/Pytorch_Retinaface."""
    return MobileNetV1()


class ResNet18(nn.Module):
    """The shape of ResNet-18 for 224×224 images."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        width = 64
        for stage, (out, stride) in enumerate(((64, 1), (128, 2), (256, 2), (512, 2)), start=1):
            blocks = [BasicBlock(width, out, stride, True), BasicBlock(out, out, 1, True)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            width = out
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def resnet18() -> nn.Module:
    """Random weights: for sizes and times alone."""
    return ResNet18()
