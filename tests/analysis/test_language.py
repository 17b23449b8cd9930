"""Perplexity, divergence and agreement, by hand."""

import math

import pytest
import torch
from torch import Tensor

from gdfq.analysis.language import language_measures, perplexity

_P = torch.tensor([0.5, 0.25, 0.25])
_Q = torch.tensor([0.25, 0.5, 0.25])


def _constant(p: Tensor) -> object:
    return lambda tokens: p.log().expand(*tokens.shape, 3)


def test_measures_of_constant_predictions() -> None:
    tokens = torch.tensor([[2, 0, 1, 0], [1, 0, 2, 2]] * 20)  # next: 0 1 0 0 2 2
    found = language_measures(_constant(_Q), _constant(_P), tokens)  # type: ignore[arg-type]
    assert found.tokens == 120
    # Of six next tokens: 0 three times, 1 once, 2 twice.
    expected = math.exp(-(3 * math.log(0.25) + math.log(0.5) + 2 * math.log(0.25)) / 6)
    original = math.exp(-(3 * math.log(0.5) + 3 * math.log(0.25)) / 6)
    assert found.perplexity == pytest.approx(expected)
    assert found.teacher_perplexity == pytest.approx(original)
    assert found.divergence == pytest.approx(0.25 * math.log(2))  # 0.5 log 2 - 0.25 log 2
    assert found.agreement == 0
    assert found.increase == pytest.approx(100 * (expected / original - 1))
    assert perplexity(_constant(_Q), tokens) == pytest.approx(expected)  # type: ignore[arg-type]


def test_model_agrees_with_itself() -> None:
    tokens = torch.tensor([[0, 1, 2]])
    found = language_measures(_constant(_P), _constant(_P), tokens)  # type: ignore[arg-type]
    assert (found.divergence, found.agreement, found.increase) == (0, 100, 0)
