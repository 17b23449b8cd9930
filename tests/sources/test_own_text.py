"""Text that a language model writes itself."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import networks
from support.language_model import captured_model
from torch import Tensor

from gdfq.data.vocabulary import Vocabulary
from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.sources.own_text import OwnText, Sampling, sampled

_VOCABULARY = Vocabulary(3, 16, 0)


def _markov(tokens: Tensor) -> Tensor:
    """Logits of a chain: after 0 comes 1 or 2 with 1 : 3, after any other token 0."""
    table = torch.tensor([[-50.0, 0.0, 3.0], [50.0, 0.0, 0.0], [50.0, 0.0, 0.0]])
    table[0, 2] = torch.log(torch.tensor(3.0))
    return table[tokens]


def _draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sequences_follow_the_distribution_of_the_model() -> None:
    found = sampled(_markov, _VOCABULARY, 2000, Sampling(length=4), _draw())
    assert found.shape == (2000, 4)
    assert (found[:, 0] == 0).all()  # the beginning of a text
    assert (found[:, 2] == 0).all()
    share = float((found[:, 1] == 2).double().mean())
    assert 0.75 - 0.04 < share < 0.75 + 0.04  # four standard errors of 2,000 draws


def test_temperature_divides_the_logits() -> None:
    found = sampled(_markov, _VOCABULARY, 2000, Sampling(length=2, temperature=0.5), _draw())
    share = float((found[:, 1] == 2).double().mean())
    assert 0.9 - 0.03 < share < 0.9 + 0.03  # 9 : 1


def test_uniform_beginning_follows_the_beginning_of_a_text() -> None:
    found = sampled(_markov, _VOCABULARY, 600, Sampling(3, beginning="uniform"), _draw())
    assert (found[:, 0] == 0).all()
    assert min(torch.bincount(found[:, 1], minlength=3).tolist()) > 150
    without = Vocabulary(3, 16)
    found = sampled(_markov, without, 600, Sampling(3, beginning="uniform"), _draw())
    assert min(torch.bincount(found[:, 0], minlength=3).tolist()) > 150


def test_model_without_a_beginning_is_refused() -> None:
    with pytest.raises(UsageError, match="this model has none"):
        sampled(_markov, Vocabulary(3, 16), 1, Sampling(), _draw())
    with pytest.raises(UsageError, match="this model has none"):
        OwnText().stream(captured_model(begin=None), steps=1)


def test_network_of_images_is_refused() -> None:
    with pytest.raises(UsageError, match="for language models"):
        OwnText().stream(networks.captured("Residual"), steps=1)


@pytest.mark.parametrize("values", [{"length": 1}, {"temperature": 0.0}])
def test_sampling_refuses_what_gives_no_text(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="own text needs"):
        Sampling(**values)


def test_stream_covers_all_sequences_each_epoch_and_resumes() -> None:
    source = OwnText(sequences=6, batch=4, sampling=Sampling(length=7))
    teacher = captured_model()
    batches = list(source.stream(teacher, steps=4))
    assert [len(batch) for batch in batches] == [4, 2, 4, 2]
    first, second = (torch.cat([b.inputs[0] for b in part]) for part in (batches[:2], batches[2:]))
    assert sorted(first.tolist()) == sorted(second.tolist())
    for batch in batches:
        (tokens,) = batch.inputs
        assert batch.labels is not None
        assert torch.equal(batch.labels, tokens[:, 1:])
    stream = source.stream(teacher, steps=4)
    next(stream)
    resumed = source.stream(teacher, steps=4)
    resumed.load_state_dict(stream.state_dict())
    for expected, batch in zip(batches[1:], resumed, strict=True):
        assert torch.equal(expected.inputs[0], batch.inputs[0])
    other = next(source.stream(teacher, steps=1, context=Context(seed=1)))
    assert not torch.equal(other.inputs[0], batches[0].inputs[0])


def test_length_is_limited_by_the_model() -> None:
    source = OwnText(sequences=2, batch=2, sampling=Sampling(length=500))
    (tokens,) = next(source.stream(captured_model(), steps=1)).inputs
    assert tokens.shape == (2, 32)
    assert source.fitted((32,)).sampling == replace(source.sampling, length=32)
    assert source.with_images(9).sequences == 9


def test_seconds_of_writing_are_those_of_a_pass_for_each_token_of_each_group() -> None:
    times = iter([10.0, 12.5])
    source = OwnText(sequences=300, sampling=Sampling(length=16))  # three groups of up to 128
    assert source.seconds_before(captured_model(), lambda: next(times)) == 2.5 * 3 * 15
