"""Text that a language model writes itself: sequences that it samples token by token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from gdfq.data.vocabulary import Vocabulary
from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.execution.progress import Listener, Step, silent
from gdfq.execution.seeding import stream as random_stream
from gdfq.files.plain_values import tagged
from gdfq.files.states import Stateful
from gdfq.graph.capture import Captured
from gdfq.graph.token_by_token import Reader, reader_of
from gdfq.sources.base import Batch, Source, next_tokens
from gdfq.sources.stream import Shuffled, Stream

Beginning = Literal["begin", "uniform"]
"""How sequences begin: with the beginning of a text, or with a uniformly drawn token after it."""

_SAMPLED_AT_ONCE, _MAX_BYTES = 128, 2**29
"""Sequences that are sampled together, at most, for more are no faster; and bytes that all of them
have of logits of a whole pass, or of keys and values. How many there are decides what is drawn: it
depends on the model and the length alone."""


@tagged("Sampling")
@dataclass(frozen=True)
class Sampling:
    """How a language model samples sequences.

    Attributes:
        length: Tokens of each sequence.
        temperature: Divides the logits; 1 draws from the model's own distribution.
        beginning: How sequences begin. Models without a beginning of text need "uniform".

    Raises:
        UsageError: The length or the temperature cannot be used.
    """

    length: int = 128
    temperature: float = 1.0
    beginning: Beginning = "begin"

    def __post_init__(self) -> None:
        if self.length < 2 or not 0 < self.temperature < float("inf"):
            raise UsageError(
                "own text needs two tokens or more and a temperature above 0; got "
                f"{self.length} tokens at temperature {self.temperature}."
            )

    def first(self, vocabulary: Vocabulary, count: int, draw: torch.Generator) -> Tensor:
        """Return the first tokens of sequences, [count, 1 or 2].

        Raises:
            UsageError: The model has no beginning of text.
        """
        begin = vocabulary.begin
        if begin is None and self.beginning == "begin":
            raise UsageError(
                "own text begins with the beginning-of-text token, and this model has none, as "
                "many chat models. Use a source with Sampling(beginning='uniform'), or give text: "
                "--data tokens.npz."
            )
        starts = [] if begin is None else [torch.full((count, 1), begin)]
        if self.beginning == "uniform":
            starts.append(torch.randint(vocabulary.size, (count, 1), generator=draw))
        return torch.cat(starts, 1)


def sampled_at_once(vocabulary: Vocabulary, sampling: Sampling, reader: Reader) -> int:
    """Return how many sequences a reader samples together."""
    of_one = max(4 * sampling.length * vocabulary.size, reader.bytes_kept)
    return max(1, min(_SAMPLED_AT_ONCE, _MAX_BYTES // of_one))


@torch.no_grad()
def sampled(
    network: Callable[[Tensor], Any],
    vocabulary: Vocabulary,
    count: int,
    sampling: Sampling,
    draw: torch.Generator,
    *,
    device: torch.device | str = "cpu",
    listener: Listener = silent,
) -> Tensor:
    """Return sequences that a language model samples from its own distribution.

    A captured graph computes each new token alone where it can (see `reader_of`).

    Args:
        network: Token ids [N, L] -> logits of the next token [N, L, vocabulary].
        vocabulary: Of the model.
        count: Number of sequences.
        sampling: How they are sampled.
        draw: All randomness, on the CPU whatever the device.
        device: Where the network is.
        listener: Receives each token of a group of sequences as a step of "own text".

    Returns:
        Integers [count, length], on the CPU.
    """
    reader = reader_of(network, sampling.length, device)
    at_once = sampled_at_once(vocabulary, sampling, reader)
    groups = -(-count // at_once)
    steps, step, found = groups * (sampling.length - 1), 0, []
    for group in torch.arange(count).split(at_once):
        reader.begin()
        chosen = sampling.first(vocabulary, len(group), draw)[:, : sampling.length]
        tokens = chosen
        while tokens.shape[1] < sampling.length:
            logits = reader.read(chosen.to(device)).float().cpu()
            chosen = (logits / sampling.temperature).softmax(1).multinomial(1, generator=draw)
            tokens = torch.cat([tokens, chosen], 1)
            step += 1
            listener(Step("own text", step, steps, {}))
        found.append(tokens)
    return torch.cat(found)


class _Sequences:
    """The sequences of a run, which a resumed run takes from its checkpoint."""

    def __init__(self) -> None:
        self.tokens: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens = state["tokens"]


@tagged("OwnText")
@dataclass(frozen=True)
class OwnText(Source):
    """Batches of sequences that the teacher wrote itself, in a new order for each epoch.

    Attributes:
        sequences: Number of sequences.
        batch: Sequences per batch.
        sampling: How they are sampled.
    """

    sequences: int = 128
    batch: int = 16
    sampling: Sampling = Sampling()

    @property
    def makes_text(self) -> bool:
        """Whether it makes text: yes."""
        return True

    @property
    def images_held(self) -> int:
        """Sequences that stay in memory: all of them."""
        return self.sequences

    def with_images(self, images: int, *, once: bool = False) -> Self:
        """Return this source with so many sequences."""
        del once
        return replace(self, sequences=images)

    def fitted(self, input_shape: Sequence[int]) -> Self:
        """Return this source with sequences of at most so many tokens, [L]."""
        length = min(self.sampling.length, *input_shape)
        return replace(self, sampling=replace(self.sampling, length=length))

    @torch.no_grad()
    def seconds_before(self, teacher: Captured, clock: Callable[[], float]) -> float | None:
        """Return how long writing takes: the token at half the length, for each token and group."""
        vocabulary = teacher.vocabulary
        if vocabulary is None:
            return None
        reader = reader_of(teacher.network, self.sampling.length, teacher.device)
        at_once = sampled_at_once(vocabulary, self.sampling, reader)
        tokens = teacher.inputs[0].zeros(min(self.sequences, at_once)).to(teacher.device)
        reader.read(tokens[:, : max(1, self.sampling.length // 2)])
        reader.read(tokens[:, :1])  # the first pass of a shape prepares the network
        started = clock()
        reader.read(tokens[:, :1])
        groups = -(-self.sequences // at_once)
        return (clock() - started) * groups * (self.sampling.length - 1)

    def stream(
        self,
        teacher: Captured,
        *,
        steps: int,
        context: Context = Context(),
    ) -> Stream:
        """Yield `steps` batches.

        Raises:
            UsageError: The teacher is no language model, or has no beginning of text.
        """
        vocabulary = teacher.vocabulary
        if vocabulary is None:
            raise UsageError(
                "own text is for language models; this network takes "
                f"{', '.join(map(str, teacher.inputs))}. Use another recipe, such as fast."
            )
        self.sampling.first(vocabulary, 1, random_stream(0, "text.check"))  # raises
        sampling = replace(self.sampling, length=min(self.sampling.length, vocabulary.length))
        draw = random_stream(context.seed, "text.order")
        order = Shuffled(draw, lambda indices: list(indices.split(self.batch)))
        sequences = _Sequences()

        def all_tokens() -> Tensor:
            if sequences.tokens is None:
                sequences.tokens = sampled(
                    teacher.network,
                    vocabulary,
                    self.sequences,
                    sampling,
                    random_stream(context.seed, "text.sample"),
                    device=teacher.device,
                    listener=context.listener,
                )
            return sequences.tokens

        def make(_: int) -> Batch:
            all_tokens()  # a stop while they are written must find the order as it was
            return read({"chosen": order.next_of(self.sequences)})

        def read(origin: Any) -> Batch:
            tokens = all_tokens()[origin["chosen"]].to(teacher.device)
            return Batch((tokens,), next_tokens(tokens), None, origin=origin)

        parts: dict[str, Stateful] = {"order": order, "sequences": sequences}
        return Stream(make, steps, [draw], parts, again=read)
