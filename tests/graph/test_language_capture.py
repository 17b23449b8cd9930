"""Capture of causal language models: any length, and refusal of what is none."""

import pytest
import torch
from support.language_model import (
    Sizes,
    TinyLanguageModel,
    captured_model,
    tiny_model,
    tokens,
    vocabulary,
)
from torch import Tensor, nn

from gdfq.data.vocabulary import Vocabulary
from gdfq.errors import UsageError
from gdfq.graph.capture import capture


@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (2, 32)])
def test_captured_model_takes_any_batch_and_length(shape: tuple[int, int]) -> None:
    captured, given = captured_model(), tokens(count=shape[0], length=shape[1], seed=5)
    assert captured.vocabulary == Vocabulary(40, 32, 1)
    assert captured.classes is None
    with torch.no_grad():
        torch.testing.assert_close(captured.network(given), tiny_model()(given))


class Encoder(TinyLanguageModel):
    """Each token sees the mean of all."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        found: Tensor = self.head(x + x.mean(1, keepdim=True))
        return found


class OtherSize(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, :, None].float().expand(-1, -1, 3).contiguous()


@pytest.mark.parametrize(
    ("model", "message"),
    [(Encoder(), "also depends on later ones"), (OtherSize(), r"returns logits \[4, 12, 40\]")],
)
def test_network_that_is_no_causal_model_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        capture(model.eval(), tokens(), vocabulary=vocabulary())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, 12), "takes one tensor of token ids"),
        (torch.full((2, 12), 40), "0 to 39; got 40 to 40"),
        (torch.zeros(2, 33, dtype=torch.int64), "at most 32 tokens"),
    ],
)
def test_example_that_does_not_fit_the_vocabulary_is_refused(given: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        capture(tiny_model(Sizes()), given, vocabulary=vocabulary())


def test_vocabulary_refuses_what_no_model_has() -> None:
    with pytest.raises(UsageError, match="among its ids"):
        Vocabulary(4, 8, 4)
