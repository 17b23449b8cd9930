"""Causal language models of Hugging Face transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gdfq.data.vocabulary import Vocabulary
from gdfq.errors import UsageError
from gdfq.graph.capture import capture
from gdfq.graph.token_by_token import TokenByToken, reader_of
from gdfq.models.language import is_causal, vocabulary_of
from gdfq.models.registry import load_model

_SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "phi3": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 24},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
}


class _Config:
    """A configuration as transformers has them."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def get_text_config(self) -> "_Config":
        return self


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"max_position_embeddings": 64, "bos_token_id": 1}, Vocabulary(9, 64, 1)),
        ({"n_positions": 32, "bos_token_id": [3, 4]}, Vocabulary(9, 32, 3)),
        ({"max_position_embeddings": 64, "sliding_window": 16}, Vocabulary(9, 16)),
        ({"max_position_embeddings": 64, "sliding_window": None}, Vocabulary(9, 64)),
    ],
)
def test_vocabulary_of_a_configuration(values: dict[str, Any], expected: Vocabulary) -> None:
    assert vocabulary_of(_Config(vocab_size=9, **values)) == expected


def test_kind_of_a_model_is_known_by_its_architecture() -> None:
    assert is_causal(_Config(architectures=["LlamaForCausalLM"]), "name")
    assert not is_causal(_Config(architectures=["ViTForImageClassification"]), "name")
    assert not is_causal(_Config(architectures=None), "name")
    for other in ("BertForMaskedLM", "T5ForConditionalGeneration"):
        with pytest.raises(UsageError, match=f"hf:name is {other}"):
            is_causal(_Config(architectures=[other]), "name")


def _saved(family: str, folder: Path) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**_SIZES, **FAMILIES[family]})
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_captured_for_any_length(family: str, tmp_path: Path) -> None:
    model = _saved(family, tmp_path)
    loaded = load_model(f"hf:{tmp_path}")
    assert loaded.vocabulary is not None
    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
    captured = capture(loaded.module, tokens, vocabulary=loaded.vocabulary)
    for length in (1, 15):
        given = torch.randint(50, (3, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected = model(input_ids=given).logits
            torch.testing.assert_close(captured.network(given), expected, atol=1e-4, rtol=1e-4)
    assert isinstance(reader_of(captured.network, 24, "cpu"), TokenByToken)


@pytest.mark.needs("transformers")
def test_folder_with_a_tokenizer_reads_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    _saved("llama", tmp_path)
    assert load_model(f"hf:{tmp_path}").encode is None
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "<s>": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    loaded = load_model(f"hf:{tmp_path}")
    assert loaded.encode is not None
    assert loaded.decode is not None
    assert loaded.encode("a b c a") == [2, 3, 0, 2]
    assert loaded.decode([2, 3]) == "a b"


@pytest.mark.needs("transformers")
def test_weights_that_are_missing_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _saved("llama", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"lack model\.norm\.weight"):
        load_model(f"hf:{tmp_path}")


@pytest.mark.needs("transformers")
def test_weights_beside_a_folder_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _saved("llama", tmp_path)
    capfd.readouterr()
    with pytest.raises(UsageError, match="weights of a language model lie in its folder"):
        load_model(f"hf:{tmp_path}", tmp_path / "model.safetensors")
    load_model(f"hf:{tmp_path}")
    assert "Loading weights" not in capfd.readouterr().err


@pytest.mark.needs("transformers")
def test_other_language_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]})
    )
    with pytest.raises(UsageError, match="must be a causal one"):
        load_model(f"hf:{tmp_path}")
