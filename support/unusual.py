"""Small networks [N, 3, 8, 8] -> [N, 5] with state, aliases, other precisions or rare operators.

Each is one line of what can go wrong when a network is captured, between the same stem and head.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPE, CLASSES, CHANNELS = (3, 8, 8), 5, 8


class Network(nn.Module):
    """Stem, middle and head; the middle is a function of the network and its features.

    Args:
        middle: Maps the network and features [N, 8, 8, 8] to features [N, 8, *, *].
        **attributes: Modules, parameters and other attributes that the middle uses.
    """

    def __init__(
        self, middle: Callable[[Any, Tensor], Tensor] = lambda _, x: x, **attributes: Any
    ) -> None:
        super().__init__()
        self.middle = middle
        self.conv = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.head = nn.Linear(CHANNELS, CLASSES)
        for name, value in attributes.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self, F.relu(self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))


def ready(network: nn.Module) -> nn.Module:
    """The network in evaluation mode, its batch norms with the statistics of noise."""
    draw = torch.Generator().manual_seed(0)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None
            if norm.affine:
                norm.weight.uniform_(0.5, 1.5, generator=draw)
                norm.bias.normal_(0, 0.3, generator=draw)
        dtype = next(network.parameters()).dtype
        network.train()(torch.randn(64, *SHAPE, generator=draw, dtype=dtype))
    return network.eval()


def _along(x: Tensor) -> Tensor:
    """Features [N, C, H, W] as a sequence [N, W, C]."""
    return x.mean(2).transpose(1, 2)


def _across(x: Tensor) -> Tensor:
    """A sequence [N, T, C] as features [N, C, T, 1]."""
    return x.transpose(1, 2)[..., None]


def _counts(network: Any, x: Tensor) -> Tensor:
    network.calls += 1
    return x


def _follows(network: Any, x: Tensor) -> Tensor:
    """A running mean and a queue that the output does not read."""
    network.average = 0.9 * network.average + 0.1 * x.mean((0, 2, 3))
    network.queue[0] = x.mean((0, 2, 3))
    return x


def _remembers(network: Any, x: Tensor) -> Tensor:
    """A grid that is made again when the shape differs from that of the last call."""
    if network.shape != x.shape:
        rows, columns = torch.meshgrid(*map(torch.arange, x.shape[2:]), indexing="ij")
        network.grid, network.shape = 0.1 * (rows + 2 * columns), x.shape
    return x + network.grid


def _typed(_network: Any, x: Tensor) -> Tensor:
    """Constants that take type, device or shape from the features."""
    rows, columns = (torch.arange(side).type_as(x) + 0.5 for side in x.shape[2:])
    rows, columns = torch.meshgrid(rows, columns, indexing="ij")
    x = x + torch.stack((columns, rows)).repeat(4, 1, 1) / 8
    x = x * x.new_tensor([1.0, 2.0] * 4).view(-1, 1, 1) + x.new_full((1, 8, 1, 1), 0.25)
    line = torch.linspace(-1, 1, x.shape[3], dtype=x.dtype, device=x.device)
    return x + line + torch.eye(8).to(x) + torch.zeros_like(x[:1]) + x.new_ones(8, 1, 1)


def _writes(_network: Any, x: Tensor) -> Tensor:
    """Slices, an index, a mask and rows of a list, written in place."""
    x = x.clone()
    x[:, 0] = 0
    x[:, :, :3] = 2 * x[:, :, 3:6]
    x[x < 0.1] = 0.5
    x[:, [1, -2]] = 1.0
    x[:, 2, :, 2:5] = x[:, 3, :, 3:6]
    return x


def _fills(_network: Any, x: Tensor) -> Tensor:
    """An uninitialised tensor that is filled in parts, and one that keeps a border of zeros."""
    both = torch.empty(x.shape[0], 16, 8, 8)
    both[:, :8] = x
    both[:, 8:] = x + 1
    border = x.new_zeros(x.shape[0], x.shape[1], 10, 10)
    border[:, :, 1:-1, 1:-1] = both[:, 4:12]
    return border


def _shifts(_network: Any, x: Tensor) -> Tensor:
    """Channels shifted along an axis (temporal shift module, arXiv 1811.08383)."""
    y = torch.zeros_like(x)
    y[:, :2, :, 1:] = x[:, :2, :, :-1]
    y[:, 2:4, :, :-1] = x[:, 2:4, :, 1:]
    y[:, 4:] = x[:, 4:]
    return y


def _interleaves(_network: Any, x: Tensor) -> Tensor:
    """Every second row and column, written with a step."""
    y = torch.zeros_like(x)
    y[:, :, ::2, ::2] = x[:, :, ::2, ::2]
    y[:, :, 1::2, 1::2] = 2 * x[:, :, ::2, 1::2]
    return y


def _by_batch_index(_network: Any, x: Tensor) -> Tensor:
    """Written at an index of each image."""
    y = x.flatten(2).clone()
    y[torch.arange(x.shape[0]), 0, 3] = 7.0
    return y[..., None]


def _generalized_mean(network: Any, x: Tensor) -> Tensor:
    """Generalized mean pooling (GeM, arXiv 1711.02512) with a learned exponent."""
    x = x.clamp(min=1e-6) ** network.p
    return F.avg_pool2d(x, (x.size(-2), x.size(-1))) ** (1 / network.p)


def _clips(network: Any, x: Tensor) -> Tensor:
    """Weights and a running mean are changed through .data."""
    network.inner.weight.data.clamp_(-0.1, 0.1)
    network.average.data.copy_(x.mean((0, 2, 3)))
    return network.inner(x)


def _in_place(_network: Any, x: Tensor) -> Tensor:
    """Elementwise operators and slices in place."""
    x = x * 1
    x.clamp_(0, 2).mul_(2).add_(1)
    x[:, 1:3] += 1
    x[:, -1].zero_()
    x[:, :, 0, :] *= 2
    x[..., -1] = x[..., 0]
    x[:, 4] = torch.arange(8.0)
    return x.masked_fill_(x > 3, torch.tensor(3.0))


def _counts_images(_network: Any, x: Tensor) -> Tensor:
    """Tensors whose size is the number of images."""
    places = torch.arange(1, x.shape[0] + 1, dtype=x.dtype, device=x.device)
    zeros = torch.zeros(x.shape[0], 1, 1, 1) + torch.full((x.shape[0], 8, 1, 1), 0.5)
    return x + 0 * places.view(-1, 1, 1, 1) + zeros


def _autocast(network: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = network.inner(x)
    return x.float()


def _unpools(_network: Any, x: Tensor) -> Tensor:
    x, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(x, places, (2, 2))


def _cell(network: Any, x: Tensor) -> Tensor:
    state = None
    for step in range(3):
        state = network.cell(x[:, :, step].mean(2), state)
    state = state[0] if isinstance(state, tuple) else state
    assert state is not None
    return state[:, :, None, None]


def _attends(network: Any, x: Tensor) -> Tensor:
    x = _along(x)
    return _across((x @ x.transpose(1, 2) + network.mask).softmax(-1) @ x)


def _twice(network: Any, x: Tensor) -> Tensor:
    return network.a(F.relu(network.b(network.a(x))))


def _tied() -> Network:
    """Two convolutions with one weight, of which one is called twice."""
    network = Network(_twice, a=nn.Conv2d(8, 8, 3, padding=1), b=nn.Conv2d(8, 8, 3, padding=1))
    network.b.weight = network.a.weight  # type: ignore[union-attr]
    return network


def _kept_features() -> Network:
    """A hook keeps features that need gradients, which cannot be deep-copied."""
    network = Network()
    network.norm.register_forward_hook(lambda module, _, y: setattr(module, "kept", y))
    network(torch.zeros(2, *SHAPE))
    return network


def _pruned() -> Network:
    from torch.nn.utils import prune

    network = Network()
    prune.l1_unstructured(network.conv, "weight", amount=0.5)
    return network


def _with(function: Callable[..., nn.Module]) -> Network:
    network = Network()
    network.conv = function(network.conv)  # type: ignore[assignment]
    return network


def _weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older of two ways
        return nn.utils.weight_norm(module)


def _recurrent(kind: Callable[..., nn.Module], **options: Any) -> Network:
    layer = kind(8, 8 // (2 if options.get("bidirectional") else 1), batch_first=True, **options)
    return Network(lambda network, x: _across(network.layer(_along(x))[0]), layer=layer)


def _sequence_first() -> Network:
    def middle(network: Any, x: Tensor) -> Tensor:
        return _across(network.layer(_along(x).transpose(0, 1))[0].transpose(0, 1))

    return Network(middle, layer=nn.LSTM(8, 8))


def _last_states() -> Network:
    """The last states of a recurrent layer instead of its outputs."""

    def middle(network: Any, x: Tensor) -> Tensor:
        _, (h, c) = network.layer(_along(x))
        return (h[-1] + c[0])[:, :, None, None]

    return Network(middle, layer=nn.LSTM(8, 8, 2, batch_first=True))


def _conv() -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1)


def _sampled(network: Any, x: Tensor) -> Tensor:
    shift = 0.1 * network.shift(x.mean((2, 3))).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(shift, list(x.shape), False), align_corners=False)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    # Networks that cannot be deep-copied, or whose weights are computed.
    "weight norm": lambda: _with(_weight_norm),
    "weight norm as parametrization": lambda: _with(nn.utils.parametrizations.weight_norm),
    "spectral norm": lambda: _with(nn.utils.spectral_norm),
    "spectral norm as parametrization": lambda: _with(nn.utils.parametrizations.spectral_norm),
    "orthogonal": lambda: _with(nn.utils.parametrizations.orthogonal),
    "pruned": _pruned,
    "kept features": _kept_features,
    # State that the output does not depend on.
    "counts": lambda: Network(_counts, calls=torch.zeros(1)),
    "follows": lambda: Network(_follows, average=torch.zeros(8), queue=torch.zeros(4, 8)),
    "remembers": lambda: Network(_remembers, shape=None),
    "clips": lambda: Network(_clips, inner=_conv(), average=torch.zeros(8)),
    # Constants and writes.
    "in place": lambda: Network(_in_place),
    "counts images": lambda: Network(_counts_images),
    "typed": lambda: Network(_typed),
    "writes": lambda: Network(_writes),
    "fills": lambda: Network(_fills),
    "shifts": lambda: Network(_shifts),
    "interleaves": lambda: Network(_interleaves),
    "by batch index": lambda: Network(_by_batch_index),
    "generalized mean": lambda: Network(_generalized_mean, p=nn.Parameter(torch.tensor([3.0]))),
    "power mean": lambda: Network(lambda _, x: F.lp_pool2d(x, 2, 2)),
    "unit length": lambda: Network(lambda _, x: 3 * F.normalize(x, dim=1)),
    "cosine": lambda: Network(lambda _, x: x * F.cosine_similarity(x, x.flip(1))[:, None]),
    "mask of infinity": lambda: Network(_attends, mask=torch.full((8, 8), -torch.inf).triu(1)),
    "choices": lambda: Network(lambda _, x: torch.where(x > 0.5, x, 0.25)),
    # Precisions.
    "double inside": lambda: Network(lambda _, x: ((x.double() - 0.1) / 0.9).float()),
    "half inside": lambda: Network(lambda _, x: ((x.half() - 0.1) / 0.9).float()),
    "bfloat16 inside": lambda: Network(lambda _, x: (x.to(torch.bfloat16) * 2).float()),
    "autocast": lambda: Network(_autocast, inner=_conv()),
    # Shared weights.
    "tied": _tied,
    # Norms.
    "norms": lambda: Network(
        lambda network, x: network.norms(x),
        norms=nn.Sequential(
            nn.InstanceNorm2d(8),
            nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            nn.GroupNorm(4, 8),
            nn.LayerNorm([8, 8, 8]),
        ),
    ),
    "rms norm": lambda: Network(lambda n, x: _across(n.rms(_along(x))), rms=nn.RMSNorm(8)),
    "batch statistics": lambda: Network(
        lambda network, x: network.own(x), own=nn.BatchNorm2d(8, track_running_stats=False)
    ),
    # Recurrent layers.
    "lstm": lambda: _recurrent(nn.LSTM),
    "gru": lambda: _recurrent(nn.GRU, bidirectional=True, num_layers=2),
    "rnn": lambda: _recurrent(nn.RNN, nonlinearity="relu"),
    "rnn of tanh": lambda: _recurrent(nn.RNN, bias=False),
    "sequence first": _sequence_first,
    "last states": _last_states,
    "lstm cell": lambda: Network(_cell, cell=nn.LSTMCell(8, 8)),
    "gru cell": lambda: Network(_cell, cell=nn.GRUCell(8, 8)),
    "rnn cell": lambda: Network(_cell, cell=nn.RNNCell(8, 8)),
    # Rare operators.
    "unfold": lambda: Network(
        lambda _, x: F.unfold(x, 3, padding=1).unflatten(1, (8, 9)).mean(2)[..., None]
    ),
    "fold": lambda: Network(lambda _, x: F.fold(F.unfold(x, 2, stride=2), (8, 8), 2, stride=2)),
    "grid sample": lambda: Network(_sampled, shift=nn.Linear(8, 6)),
    "nearest exact": lambda: Network(
        lambda _, x: F.interpolate(x, scale_factor=2, mode="nearest-exact")
    ),
    "antialiased": lambda: Network(
        lambda _, x: F.interpolate(x, size=(5, 5), mode="bilinear", antialias=True)
    ),
    "max unpooling": lambda: Network(_unpools),
    "random leaky relu": lambda: Network(lambda n, x: n.slope(x - 1), slope=nn.RReLU()),
}
"""Networks by what is unusual about them."""


def chain(*names: str) -> Network:
    """A network with the middles of several networks in turn."""
    parts = nn.ModuleList(make(name) for name in names)

    def middle(network: Any, x: Tensor) -> Tensor:
        for part in network.parts:
            x = F.adaptive_avg_pool2d(part.middle(part, x), 8)
        return x

    network = Network(middle, parts=parts)
    return ready(network)  # type: ignore[return-value]


@functools.cache
def make(name: str) -> nn.Module:
    """A network, ready to be captured; not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ready(NETWORKS[name]())


NAMES = (
    *("class", "lambda", "None", "code", "graph", "self", "weight", "bias", "folded_weight"),
    *("level-1", "level_1", "level 1", "level_1_", "3x3", "0", "größe", "ﬁ", "层", "a'b", 'a"b'),
    *("a\\b", "a\nb", "{x}", "%s", "quantized", "scale", "codes", "conv2d", "relu_1", "_", "__x"),
    *("recompile", "print_readable", "x", "images", "output", "input", "torch"),
)
"""Names of modules that nn.Module accepts."""


def named(*names: str) -> nn.Module:
    """A network of convolutions with these names, and a linear layer with the last one."""
    *first, last = names
    network = nn.Sequential()
    for index, name in enumerate(first):
        network.add_module(name, nn.Conv2d(3 if index == 0 else 4, 4, 1))
    network.add_module("pool of all", nn.AdaptiveAvgPool2d(1))
    network.add_module("flatten/", nn.Flatten())
    network.add_module(last, nn.Linear(4 if first else 3, CLASSES))
    return network.eval()


class TiedAutoencoder(nn.Module):
    """The decoder is the transpose of the encoder."""

    def __init__(self, copied: bool) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.encode = nn.Conv2d(6, 16, 3, padding=1)
        self.back = nn.Parameter(self.encode.weight.detach().clone()) if copied else None
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.encode(F.relu(self.norm(self.stem(x)))))
        weight = self.encode.weight if self.back is None else self.back
        return F.conv_transpose2d(x, weight, self.bias, padding=1)


def tied_autoencoder(copied: bool) -> nn.Module:
    """A tied autoencoder, or an equal one with a copy of the weight."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ready(TiedAutoencoder(copied))
