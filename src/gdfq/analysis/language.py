"""Measures of language models on sequences of tokens: perplexity, divergence, agreement."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdfq.execution.progress import Listener, Step, silent
from gdfq.execution.tracing import without_concurrent_tracing
from gdfq.functional.losses import next_token_losses, token_divergences

_SEQUENCES_AT_ONCE, _MAX_LOGITS = 16, 2**26
"""Sequences that pass together, at most, and numbers of their logits together (256 MiB)."""


@dataclass(frozen=True)
class LanguageMeasures:
    """How a student predicts the next tokens of sequences, beside its teacher.

    Attributes:
        tokens: Number of predicted tokens.
        perplexity: The student's: exp of the mean cross-entropy of the next token.
        teacher_perplexity: The teacher's.
        divergence: Mean KL(teacher ‖ student) of the distributions of the next token, in nats.
        agreement: Share of tokens for which both rate the same token highest, in percent.
    """

    tokens: int
    perplexity: float
    teacher_perplexity: float
    divergence: float
    agreement: float

    @property
    def increase(self) -> float:
        """The student's perplexity over the teacher's, in percent above it."""
        return 100 * (self.perplexity / self.teacher_perplexity - 1)

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.3f} (original {self.teacher_perplexity:.3f}, "
            f"{self.increase:+.1f} %), KL {self.divergence:.4f} nats a token, same first choice "
            f"for {self.agreement:.1f} % of {self.tokens} tokens"
        )


Network = Callable[[Tensor], Any]
"""Token ids [N, L] -> logits of the next token [N, L, vocabulary]."""


@without_concurrent_tracing
@torch.no_grad()
def language_measures(
    student: Network,
    teacher: Network,
    tokens: Tensor,
    *,
    device: torch.device | str = "cpu",
    listener: Listener = silent,
) -> LanguageMeasures:
    """Compare a student with its teacher on all next tokens of sequences.

    Args:
        student: The quantized model.
        teacher: The original model, on the same device.
        tokens: [N, L].
        device: Where both are.
        listener: Receives each group of sequences as a step of "evaluate".
    """
    losses = torch.zeros(2, dtype=torch.float64)
    divergence, equal, count = 0.0, 0, 0
    parts = _parts(teacher, tokens, device)
    for step, part in enumerate(parts, start=1):
        part = part.to(device)
        ours, theirs = student(part), teacher(part)
        for index, logits in enumerate((ours, theirs)):
            losses[index] += next_token_losses(logits, part).double().sum().cpu()
        ours, theirs = ours[:, :-1], theirs[:, :-1]
        divergence += float(token_divergences(ours, theirs).double().sum())
        equal += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        count += ours.shape[0] * ours.shape[1]
        listener(Step("evaluate", step, len(parts), {}))
    own, original = (_exp(float(loss) / count) for loss in losses)
    return LanguageMeasures(count, own, original, divergence / count, 100 * equal / count)


@without_concurrent_tracing
@torch.no_grad()
def perplexity(
    network: Network,
    tokens: Tensor,
    *,
    device: torch.device | str = "cpu",
    listener: Listener = silent,
) -> float:
    """Return the perplexity of one language model on all next tokens of sequences [N, L]."""
    loss, count = 0.0, 0
    parts = _parts(network, tokens, device)
    for step, part in enumerate(parts, start=1):
        part = part.to(device)
        losses = next_token_losses(network(part), part)
        loss += float(losses.double().sum())
        count += losses.numel()
        listener(Step("evaluate", step, len(parts), {}))
    return _exp(loss / count)


def _parts(network: Network, tokens: Tensor, device: torch.device | str) -> tuple[Tensor, ...]:
    """Return sequences [N, L] in parts that pass together."""
    vocabulary = network(tokens[:1, :2].to(device)).shape[-1]
    most = _MAX_LOGITS // (tokens.shape[1] * vocabulary)
    parts: tuple[Tensor, ...] = tokens.split(max(1, min(_SEQUENCES_AT_ONCE, most)))
    return parts


def _exp(loss: float) -> float:
    """Return exp(loss), or infinity beyond what a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
