"""A language model that computes new tokens alone gives the logits of whole passes."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from support.language_model import Sizes, captured_model
from torch import Tensor, fx, nn

from gdfq.data.vocabulary import Vocabulary
from gdfq.graph.capture import Captured, capture
from gdfq.graph.token_by_token import Reader, TokenByToken, WholePasses, reader_of

_SIZE, _WIDTH, _LENGTH = 11, 8, 16
Mixing = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Model(nn.Module):
    """A causal model with learned positions, whose tokens a function mixes."""

    def __init__(self, mixed: Mixing) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.place = nn.Embedding(_SIZE, _WIDTH), nn.Embedding(_LENGTH, _WIDTH)
        self.layers = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(3))
        self.head, self.mixed = nn.Linear(_WIDTH, _SIZE), mixed

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.place(torch.arange(tokens.shape[1]))
        found: Tensor = self.head(x + self.mixed(*(layer(x) for layer in self.layers)))
        return found


def _products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT / math.sqrt(_WIDTH)).view(q.shape[0], q.shape[1], k.shape[1])
    mask = torch.full((q.shape[1], k.shape[1]), -math.inf).triu(1)
    return (scores + mask).softmax(-1) @ v


def _distances(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(q.shape[1])
    far = place[:, None] - place  # ALiBi: a penalty for each step back
    scores = torch.where(far >= 0, q @ k.mT - 0.3 * far, -1e9)
    return scores.softmax(-1) @ v


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b, c = (x.view(x.shape[0], x.shape[1], 2, -1).transpose(1, 2) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(a, b, c, is_causal=True)
    return mixed.transpose(1, 2).reshape(q.shape)


def _window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(q.shape[1])
    back = place[:, None] - place
    mask = torch.where((back - 1).abs() > 1, -1e9, 0.0)  # each position sees the last three
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    del k
    return q + v.cumsum(1)


def _averages(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    del k
    return q + F.conv1d(F.pad(v.mT, (2, 0)), torch.ones(_WIDTH, 1, 3), groups=_WIDTH).mT


def _shift(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    del k
    return q + F.pad(v, (0, 0, 12, 0))[:, : q.shape[1]]  # what was read twelve tokens before


class _Masking(_Model):
    """Hides a token from those after it, as models do with the token that pads a text."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.place(torch.arange(tokens.shape[1]))
        q, k, v = (layer(x) for layer in self.layers)
        hidden = torch.where(tokens == 5, -1e9, 0.0)[:, None]
        mask = torch.full((q.shape[1], q.shape[1]), -1e9).triu(1)
        found: Tensor = self.head(x + (q @ k.mT + mask + hidden).softmax(-1) @ v)
        return found


def _captured(mixed: Mixing, model: type[_Model] = _Model) -> Captured:
    example = torch.zeros(1, _LENGTH, dtype=torch.long)
    return capture(model(mixed).eval(), example, vocabulary=Vocabulary(_SIZE, _LENGTH, 0))


def _text(count: int = 3, size: int = _SIZE, length: int = _LENGTH) -> Tensor:
    return torch.randint(size, (count, length), generator=torch.Generator().manual_seed(0))


def _check_same(reader: Reader, network: fx.GraphModule, text: Tensor, first: int) -> None:
    """Read `first` tokens together and the others one by one, and compare with whole passes."""
    reader.begin()
    for start, end in pairwise([0, *range(first, text.shape[1] + 1)]):
        expected = network(text[:, :end])[:, -1]
        torch.testing.assert_close(reader.read(text[:, start:end]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first", [1, 2, 5])
@pytest.mark.parametrize("mixed", [_products, _distances, _attention, _window])
def test_new_tokens_alone_have_the_logits_of_whole_passes(mixed: Mixing, first: int) -> None:
    network = _captured(mixed).network
    reader = reader_of(network, _LENGTH, "cpu")
    assert isinstance(reader, TokenByToken)
    _check_same(reader, network, _text(), first)
    _check_same(reader, network, _text(2).flip(1), first)  # nothing of the first text is left


def test_model_with_rotations_and_shared_heads_is_read_token_by_token() -> None:
    sizes = Sizes()
    network = captured_model().network
    reader = reader_of(network, sizes.length, "cpu")
    assert isinstance(reader, TokenByToken)
    _check_same(reader, network, _text(3, sizes.vocabulary, sizes.length), 1)


def test_keys_and_values_are_counted() -> None:
    reader = reader_of(_captured(_products).network, _LENGTH, "cpu")
    assert reader.bytes_kept == 2 * _WIDTH * _LENGTH * 4  # keys and values of float32


@pytest.mark.parametrize("mixed", [_sums, _averages, _shift])
def test_model_that_mixes_tokens_otherwise_passes_whole_texts(mixed: Mixing) -> None:
    network = _captured(mixed).network
    reader = reader_of(network, _LENGTH, "cpu")
    assert isinstance(reader, WholePasses)
    _check_same(reader, network, _text(), 1)


def test_model_that_compares_tokens_passes_whole_texts() -> None:
    network = _captured(_products, _Masking).network
    reader = reader_of(network, _LENGTH, "cpu")
    assert isinstance(reader, WholePasses)
    _check_same(reader, network, _text(), 1)


def test_shortage_of_memory_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(TokenByToken, "read", short)
    with pytest.raises(torch.OutOfMemoryError):
        reader_of(_captured(_products).network, _LENGTH, "cpu")


def test_function_that_is_no_graph_passes_whole_texts() -> None:
    def logits(tokens: Tensor) -> Tensor:
        return F.one_hot(tokens.cumsum(1) % _SIZE, _SIZE).float()

    reader = reader_of(logits, _LENGTH, "cpu")
    assert isinstance(reader, WholePasses)
    reader.read(torch.tensor([[3, 4]]))
    assert reader.read(torch.tensor([[2]])).argmax() == 9
