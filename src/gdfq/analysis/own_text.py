"""A quantized language model on text that its original writes: without data, and for the report."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gdfq.analysis.language import LanguageMeasures, language_measures
from gdfq.data.tokens import Decode
from gdfq.data.vocabulary import Vocabulary
from gdfq.execution.progress import Listener, silent
from gdfq.execution.seeding import stream as random_stream
from gdfq.graph import queries
from gdfq.graph.capture import Captured
from gdfq.graph.walk import Walk
from gdfq.sources.own_text import Sampling, sampled
from gdfq.student.integer_network import IntegerNetwork

_SEQUENCES, _TOKENS = 32, 64
"""Held-out sequences of own text, and their tokens."""
_SHOWN = 3
"""Sequences of teacher and student that the report shows."""


def sampling_of(vocabulary: Vocabulary) -> Sampling:
    """Return how held-out text of a model is sampled, which may have no beginning of text."""
    begins = vocabulary.begin is not None
    return Sampling(min(_TOKENS, vocabulary.length), beginning="begin" if begins else "uniform")


def held_out_measures(
    network: IntegerNetwork, teacher: Captured, *, seed: int, listener: Listener = silent
) -> LanguageMeasures:
    """Compare a student with its teacher on text that the teacher writes and no stage has seen.

    Args:
        network: The frozen student.
        teacher: The language model that it was made from.
        seed: Seed of the run.
        listener: Receives each token of the text as a step of "own text".
    """
    tokens = _written(teacher.network, teacher, _SEQUENCES, seed, "text.held out", listener)
    return language_measures(network, teacher.network, tokens, device=teacher.device)


@dataclass(frozen=True)
class Outliers:
    """How far the largest channel stands out of what a layer reads.

    Attributes:
        layer: Name of the layer.
        before: Mean over tokens of max|x| / rms(x) in the original.
        after: The same with the student's equalizer.
    """

    layer: str
    before: float
    after: float


@dataclass(frozen=True)
class TextEvidence:
    """What the report shows of a language model.

    Attributes:
        outliers: Of each layer.
        teacher_text: What the teacher writes, in words, or as token ids without a tokenizer.
        student_text: What the student writes from the same seed.
    """

    outliers: tuple[Outliers, ...]
    teacher_text: tuple[str, ...]
    student_text: tuple[str, ...]


def measure_text(
    teacher: Captured,
    equalized: Captured,
    network: IntegerNetwork,
    inputs: Sequence[Tensor],
    seed: int,
    decode: Decode | None = None,
) -> TextEvidence:
    """Measure outliers before and after the equalizer, and let both models write.

    Args:
        teacher: The original.
        equalized: The teacher with the student's equalizer.
        network: The frozen student.
        inputs: Token ids [N, L]; a few are used.
        seed: Seed of the run.
        decode: The text of token ids.
    """
    few = [tokens[:4].to(teacher.device) for tokens in inputs]
    before, after = (_peaks(found, few) for found in (teacher, equalized))
    words = decode or (lambda tokens: " ".join(map(str, tokens)))
    texts = [
        tuple(map(words, _written(model, teacher, _SHOWN, seed, "text.shown").tolist()))
        for model in (teacher.network, network)
    ]
    outliers = (Outliers(name, peak, after[name]) for name, peak in before.items())
    return TextEvidence(tuple(outliers), *texts)


def _written(
    model: Any,
    teacher: Captured,
    count: int,
    seed: int,
    purpose: str,
    listener: Listener = silent,
) -> Tensor:
    vocabulary = teacher.vocabulary
    assert vocabulary is not None
    return sampled(
        model,
        vocabulary,
        count,
        sampling_of(vocabulary),
        random_stream(seed, purpose),
        device=teacher.device,
        listener=listener,
    )


@torch.no_grad()
def _peaks(teacher: Captured, inputs: Sequence[Tensor]) -> dict[str, float]:
    """Return the mean of max|x| / rms(x) over the tokens that each layer reads, by its name."""
    return {
        queries.layer_name(visit.node): float(
            (visit.inputs[0].abs().amax(-1) / visit.inputs[0].square().mean(-1).sqrt()).mean()
        )
        for visit in Walk(teacher.network).visits(*inputs)
        if queries.has_weight(visit.node)
    }


def as_metrics(measures: LanguageMeasures) -> dict[str, float]:
    """Return measures as they stand in the metrics of a run."""
    return {name: round(value, 6) for name, value in asdict(measures).items()}
