"""The token ids of a language model."""

from dataclasses import dataclass

from torch import Tensor

from gdfq.errors import UsageError

TOKENS = "tokens"
"""The name of the one input of a language model, in files and in `Captured`."""


@dataclass(frozen=True)
class Vocabulary:
    """The token ids of a language model.

    Attributes:
        size: Ids are 0..size - 1.
        length: Most tokens of a sequence.
        begin: The id of the beginning of a text; None for a model without one.

    Raises:
        UsageError: There are no such ids.
    """

    size: int
    length: int
    begin: int | None = None

    def __post_init__(self) -> None:
        begins_inside = self.begin is None or 0 <= self.begin < self.size
        if self.size < 2 or self.length < 2 or not begins_inside:
            raise UsageError(
                "a vocabulary needs two ids or more, sequences of two tokens or more, and a "
                f"beginning of text among its ids; got {self.size} ids, {self.length} tokens, "
                f"beginning {self.begin}."
            )

    def check(self, tokens: Tensor) -> None:
        """Check that sequences fit the model.

        Args:
            tokens: Integers [N, L].

        Raises:
            UsageError: An id is not of the vocabulary, or the sequences are too long.
        """
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.size:
            raise UsageError(
                f"token ids must be of the model's vocabulary, 0 to {self.size - 1}; got {low} to "
                f"{high}. Use tokens of the model's own tokenizer."
            )
        if tokens.shape[1] > self.length:
            raise UsageError(
                f"sequences must have at most {self.length} tokens, the length of the model; got "
                f"{tokens.shape[1]}. Divide them into shorter ones."
            )
