"""Given text: sequences of token ids, or a text file for the model's tokenizer."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdfq.data.tensors import TensorData
from gdfq.data.vocabulary import TOKENS, Vocabulary
from gdfq.errors import UsageError
from gdfq.files.untrusted import read_npz

Encode = Callable[[str], Sequence[int]]
"""Returns the token ids of a text, without a beginning."""
Decode = Callable[[Sequence[int]], str]
"""Returns the text of token ids."""

_TEXT = ".txt"
_MAX_TEXT_BYTES = 2**28


def load_tokens(data: Any, vocabulary: Vocabulary, encode: Encode | None = None) -> TensorData:
    """Read sequences of token ids of one length.

    Args:
        data: Integers [N, L] as a tensor or array, or under the name `tokens` in a mapping or an
            .npz file; or a .txt file.
        vocabulary: Of the language model.
        encode: The model's tokenizer, which a .txt file needs.

    Raises:
        UsageError: They cannot be read, or do not fit the model.
    """
    tokens = _sequences(data, vocabulary, encode)
    if tokens.ndim != 2 or not _is_integer(tokens) or tokens.numel() == 0 or len(tokens[0]) < 2:
        raise UsageError(
            "text must be integers [sequences, tokens] of at least two tokens each, under the name "
            f"'{TOKENS}' in a file; got {tokens.dtype} of {list(tokens.shape)}."
        )
    tokens = tokens.to(torch.int64)
    vocabulary.check(tokens)
    return TensorData((tokens,))


def _is_integer(tokens: Tensor) -> bool:
    kinds = tokens.is_floating_point(), tokens.is_complex(), tokens.dtype == torch.bool
    return not any(kinds)


def _sequences(data: Any, vocabulary: Vocabulary, encode: Encode | None) -> Tensor:
    if isinstance(data, str | Path):
        path = Path(data)
        if path.suffix.lower() == _TEXT:
            return _divided(_encoded(path, encode), vocabulary)
        try:
            data = read_npz(path)
        except Exception as error:  # zipfile and zlib raise types of their own
            raise UsageError(
                f"text must be a readable .npz file with integers '{TOKENS}' [sequences, tokens], "
                f"or a .txt file; {path} is none: {error}."
            ) from error
    if isinstance(data, Mapping):
        if TOKENS not in data:
            raise UsageError(
                f"text must be under the name '{TOKENS}'; got {', '.join(map(str, data))}."
            )
        data = data[TOKENS]
    if isinstance(data, np.ndarray):
        if data.dtype.kind not in "iu":
            raise UsageError(f"text must be token ids, which are integers; got {data.dtype}.")
        data = data.astype(np.int64)  # other integers may be of another byte order
    if not isinstance(data, Tensor | np.ndarray):
        raise UsageError(
            f"text must be a tensor of token ids, an .npz or a .txt file; got a "
            f"{type(data).__name__}."
        )
    return torch.as_tensor(data).detach().cpu()


def _encoded(path: Path, encode: Encode | None) -> Sequence[int]:
    """Return the token ids of a text file."""
    if encode is None:
        raise UsageError(
            f"a text file needs the tokenizer of the model, which has none; got {path}. Give "
            f"token ids: an .npz file with integers '{TOKENS}' [sequences, tokens]."
        )
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_TEXT_BYTES + 1)
        if len(text) > _MAX_TEXT_BYTES:
            raise UsageError(
                f"a text file may have {_MAX_TEXT_BYTES} bytes; {path} has more. Give a part."
            )
        return encode(text.decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"text must be a readable file in UTF-8; {path} is not: {error}."
        ) from error


_SEQUENCE_TOKENS = 256
"""Tokens of the sequences that a text file is divided into, at most."""


def _divided(tokens: Sequence[int], vocabulary: Vocabulary) -> Tensor:
    """Return the tokens of a text as sequences of one length, each with the beginning of a text."""
    begin = [] if vocabulary.begin is None else [vocabulary.begin]
    length = min(_SEQUENCE_TOKENS, vocabulary.length) - len(begin)
    length = min(length, len(tokens))
    rows = len(tokens) // length if length else 0
    parts = [[*begin, *tokens[i * length : (i + 1) * length]] for i in range(rows)]
    return torch.tensor(parts, dtype=torch.int64).reshape(rows, len(begin) + length)
