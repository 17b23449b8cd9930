"""Given text: token ids and text files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gdfq.data.tokens import load_tokens
from gdfq.data.vocabulary import Vocabulary
from gdfq.errors import UsageError

_VOCABULARY = Vocabulary(300, 8, 1)


def _encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_tokens_of_a_file_an_array_and_a_tensor_are_the_same(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.uint16).reshape(3, 4)
    np.savez(tmp_path / "text.npz", tokens=array)
    for data in (tmp_path / "text.npz", array, torch.arange(12).view(3, 4), {"tokens": array}):
        (tokens,) = load_tokens(data, _VOCABULARY).tensors
        assert tokens.dtype == torch.int64
        assert tokens.tolist() == array.tolist()


def test_text_file_becomes_sequences_that_begin_a_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcdefghijklmnopq", encoding="utf-8")
    (tokens,) = load_tokens(tmp_path / "text.txt", _VOCABULARY, _encode).tensors
    assert tokens.tolist() == [[1, *map(ord, "abcdefg")], [1, *map(ord, "hijklmn")]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.tensor([[1, 300]]), "0 to 299; got 1 to 300"),
        (torch.tensor([[-1, 3]]), "got -1 to 3"),
        (torch.zeros(2, 9, dtype=torch.int64), "at most 8 tokens"),
        (torch.zeros(2, 4), "integers"),
        (torch.zeros(2, 4, dtype=torch.bool), "integers"),
        (torch.zeros(2, 4, dtype=torch.complex64), "integers"),
        (np.array([["a", "b"]]), "which are integers"),
        (torch.zeros(2, 1, dtype=torch.int64), "at least two tokens"),
        (torch.zeros(0, 4, dtype=torch.int64), "integers"),
        ({"images": torch.zeros(2, 2)}, "under the name 'tokens'; got images"),
        (3, "got a int"),
        ("absent.npz", "readable .npz"),
        ("absent.txt", "UTF-8"),
    ],
)
def test_text_that_cannot_be_used_is_refused(data: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_tokens(data, _VOCABULARY, _encode)


def test_token_ids_may_have_another_byte_order() -> None:
    (tokens,) = load_tokens(np.array([[1, 299]], ">i4"), _VOCABULARY).tensors
    assert tokens.tolist() == [[1, 299]]


def test_text_file_needs_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abc", encoding="utf-8")
    with pytest.raises(UsageError, match="needs the tokenizer"):
        load_tokens(tmp_path / "text.txt", _VOCABULARY)


def test_text_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        load_tokens(tmp_path / "text.txt", _VOCABULARY, _encode)


def test_empty_text_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="at least two tokens"):
        load_tokens(tmp_path / "text.txt", _VOCABULARY, _encode)
