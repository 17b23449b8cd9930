"""Small networks that together use everything that capture must support."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdfq.graph.capture import Captured, capture

SHAPE = (3, 8, 8)
CLASSES = 5


class Residual(nn.Module):
    """Functional ReLUs, an in-place addition, and one batch norm with a negative scale."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x
        y = F.relu(y, inplace=True)
        y = F.avg_pool2d(y, y.size(3))
        return self.fc(y.view(y.size(0), -1))


class Branches(nn.Module):
    """ReLU6, grouped, depthwise and dilated convolutions, concatenation, pooling, padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.same = nn.Conv2d(16, 6, 3, padding="same")
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a = F.hardtanh(self.grouped(x), 0.0, 6.0)
        b = self.norm(self.depthwise(x))
        x = self.pool(torch.cat([a, b], 1))
        x = F.pad(x, (1, 1, 1, 1))
        return self.fc(F.adaptive_avg_pool2d(self.same(x).relu(), 1).flatten(1))


class Shared(nn.Module):
    """One convolution used twice, each time with its own batch norm, and a shared ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm in self.norms:
            x = self.relu(norm(self.conv(x)))
        return self.fc(x.mean((2, 3)))


class Transposed(nn.Module):
    """Transposed convolutions (one grouped), LeakyReLU, PReLU, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 6, 2, stride=2, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.grouped = nn.ConvTranspose2d(6, 8, 3, padding=1, groups=2)
        self.norm2 = nn.BatchNorm2d(8)
        self.act = nn.PReLU()
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm1(self.up(x)), 0.1)
        x = self.act(self.norm2(self.grouped(x)))
        return self.fc(F.relu(self.drop(x.amax((2, 3)))))


class Preactivation(nn.Module):
    """Batch norms before convolutions and behind a linear layer, squeeze and excitation, SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm0 = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8, affine=False)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.fc1 = nn.Linear(8, 8)
        self.norm2 = nn.BatchNorm1d(8)
        self.fc2 = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(self.conv(F.relu(self.norm0(x)))))
        x = x * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = F.relu(self.norm2(self.fc1(x.mean((2, 3)))))
        return self.fc2(x)


class ActivatedNorm(nn.BatchNorm2d):
    """A batch norm that also activates, as timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Standardised(nn.Module):
    """Weight standardisation: the convolution's weight is computed; and an activating norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = ActivatedNorm(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        variance, mean = torch.var_mean(weight, (1, 2, 3), keepdim=True)
        x = self.norm(F.conv2d(x, (weight - mean) / (variance + 1e-5).sqrt(), padding=1))
        channels = x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)  # channel shuffle
        return self.fc(channels.mean((2, 3)))


class Awkward(nn.Module):
    """Names and tensors like those of the student; products with bare matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.conv.scale = nn.Parameter(torch.empty(4, 1, 1))
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.quantized = nn.Parameter(torch.empty(8, 8))
        self.mask = nn.Parameter(torch.ones(8, dtype=torch.int64), requires_grad=False)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 0.5) / 0.25  # normalises inside
        y = F.relu(self.norm(self.conv(x))) * self.conv.scale  # type: ignore[operator]
        y = y + self.conv.bias.view(-1, 1, 1)  # type: ignore[union-attr]
        y = torch.cat([y.max(2)[0].max(2)[0], y.mean((2, 3))], 1) @ self.quantized
        y = F.linear(y * self.mask, self.quantized)
        return self.fc(F.relu(y.unflatten(1, (2, 4)).flatten(1)))


class Borders(nn.Module):
    """Pooling over borders, a convolution that is used twice, names that operators have."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv2d_1 = nn.Conv2d(6, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.relu(x)))
        x = F.relu(self.conv2d_1(3 * F.relu(self.conv2d_1(x))))
        x = self.up(F.avg_pool2d(x, 3, 2, 1, ceil_mode=True))
        x = F.avg_pool2d(F.pad(x, (1, 2, 0, 1)), 3, 1, 1, count_include_pad=False)
        return self.fc(F.relu(x).amax((2, 3)))


class Tokens(nn.Module):
    """Linear layers on sequences, of which one is a transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Linear(4, 4)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.embed(x))).flatten(2)
        x = x + F.relu(self.mix(x))
        return self.fc(x.transpose(1, 2).mean(1))


class Shuffled(nn.Module):
    """Half of the channels pass a branch, and all are shuffled: a unit of ShuffleNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = self.stem(x).chunk(2, 1)
        x = torch.cat([kept, self.branch(changed)], 1)
        x = x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        first, second = self.head(x).split((3, 5), 1)
        return self.fc(torch.cat([second, first], 1).mean((2, 3)))


class Detector(nn.Module):
    """A backbone with two heads at two scales: a dictionary of boxes and scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.down = nn.Sequential(
            nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.boxes = nn.Conv2d(8, 4, 1)
        self.scores = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> dict[str, object]:
        fine = self.stem(x)
        coarse = self.down(fine)
        levels = [fine, coarse]
        scores = [torch.sigmoid(self.scores(level)).flatten(2) for level in levels]
        return {
            "boxes": tuple(self.boxes(level).flatten(2) for level in levels),
            "scores": torch.cat(scores, 2),
        }


class Segmenter(nn.Module):
    """An encoder and decoder with a skip connection: a class for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.down = nn.Sequential(
            nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        coarse = F.relu(self.up(self.down(fine)))
        return self.head(torch.cat([fine, coarse], 1))


class Block(nn.Module):
    """A transformer's block: attention and a perceptron, each behind its norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """A small vision transformer, which has no batch norm: images [N, 1, 8, 8] -> logits [N, 10]."""

    SHAPE = (1, 8, 8)

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 17, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x)[:, 0]))


def trained_transformer(images: Tensor, labels: Tensor) -> nn.Module:
    """A Transformer that reads digits, images normalised [N, 1, 8, 8]; takes seconds."""
    random = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer().train()
    steps, step = 29 * 40, 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1, (n + 1) / 100) * (1 - n / steps)
    )
    while step < steps:
        for chosen in torch.randperm(len(images), generator=random).split(32):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            step += 1
    return model.eval()


class Audio(nn.Module):
    """Sound, one-dimensional: two channels of samples, a regression of three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(2, 8, 9, 4, 4), nn.BatchNorm1d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv1d(8, 8, 3, 1, 2, 2), nn.BatchNorm1d(8), nn.Hardswish())
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.max_pool1d(self.body(self.stem(x)), 2).mean(2))


class Volume(nn.Module):
    """Volumes: three-dimensional convolutions, and an upsampled map of probabilities beside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(1, 6, 3, 1, 1), nn.BatchNorm3d(6), nn.ReLU())
        self.down = nn.Sequential(nn.Conv3d(6, 8, 3, 2, 1), nn.BatchNorm3d(8), nn.ReLU())
        self.head = nn.Conv3d(8, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.down(self.stem(x))
        return F.interpolate(torch.sigmoid(self.head(x)), scale_factor=2), x.amax((2, 3, 4))


TASKS: dict[str, type[nn.Module]] = {
    cls.__name__: cls for cls in (Detector, Segmenter, Audio, Volume)
}
"""Networks whose outputs are not logits of classes (Audio's look as if they were)."""

NETWORKS: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        *(Residual, Branches, Shared, Transposed, Preactivation, Standardised, Awkward),
        *(Borders, Tokens, Shuffled),
    )
}


def shape_of(name: str) -> tuple[int, ...]:
    """The shape of a network's input."""
    return {"Audio": (2, 64), "Volume": (1, 8, 8, 8), "Transformer": Transformer.SHAPE}.get(
        name, SHAPE
    )


def make(name: str, seed: int = 0) -> nn.Module:
    """The network in evaluation mode, with weights of ordinary size and its own statistics."""
    random = torch.Generator().manual_seed(seed)
    network = (NETWORKS | TASKS | {"Transformer": Transformer})[name]()
    with torch.no_grad():
        for parameter in filter(torch.is_floating_point, network.parameters()):
            fan = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.normal_(0, fan**-0.5, generator=random)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.affine:
                    module.weight.uniform_(0.5, 1.5, generator=random)
                    module.weight[0].neg_()
                module.momentum = None  # the plain average: statistics as training leaves them
        network.train()(1.3 * images(256, seed=9, shape=shape_of(name)) + 0.2)
    return network.eval()


@functools.cache
def captured(name: str) -> Captured:
    """The network as `capture` returns it, captured once in a process; not to be changed."""
    return capture(make(name), images(1, shape=shape_of(name)))


def images(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def that_saw(images: Tensor) -> nn.Module:
    """A network with random weights and the batch-norm statistics of images [N, 3, 16, 16]."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False),
        nn.BatchNorm2d(12, momentum=1.0),
        nn.Flatten(),
        nn.Linear(12 * 14 * 14, 4),
    )
    network.train()(images)
    return network.eval()
