"""Causal language models of Hugging Face transformers, as networks of token ids alone."""

from typing import Any

import torch
from torch import Tensor, nn

from gdfq.data.tokens import Decode, Encode
from gdfq.data.vocabulary import Vocabulary
from gdfq.errors import UsageError
from gdfq.models.loaded import Loaded

_CAUSAL = ("ForCausalLM", "LMHeadModel")
_OTHERS = ("ForMaskedLM", "ForPreTraining", "ForConditionalGeneration", "ForSeq2SeqLM")
"""Endings of the architectures in a configuration: of causal language models; of others, which
either see later tokens or read a second sequence."""


class NextToken(nn.Module):
    """A causal language model: token ids [N, L] -> logits of the next token [N, L, vocabulary].

    Positions and the causal mask are made of the length alone, so that a captured graph holds no
    search for padding or for several texts in one sequence.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        lowest = torch.finfo(torch.float32).min
        mask = torch.full((length, length), lowest, device=tokens.device).triu(1)
        positions = torch.arange(length, device=tokens.device)[None]
        found: Any = self.model(
            input_ids=tokens,
            attention_mask=mask[None, None],
            position_ids=positions,
            use_cache=False,
        )
        logits: Tensor = found.logits
        return logits


def is_causal(config: Any, name: str) -> bool:
    """Return whether a configuration of transformers is that of a causal language model.

    Args:
        config: The configuration.
        name: The name of the model, for errors.

    Raises:
        UsageError: It is that of another kind of language model.
    """
    architectures = [str(known) for known in getattr(config, "architectures", None) or ()]
    if any(known.endswith(_CAUSAL) for known in architectures):
        return True
    wrong = [known for known in architectures if known.endswith(_OTHERS)]
    if wrong:
        raise UsageError(
            f"a language model must be a causal one, which predicts each token from the earlier "
            f"ones; hf:{name} is {', '.join(wrong)}. Choose one whose architecture ends with "
            f"{_CAUSAL[0]}."
        )
    return False


def load_causal(transformers: Any, name: str, *, pretrained: bool) -> Loaded:
    """Load a causal language model with its vocabulary, and with its tokenizer if it has one.

    Args:
        transformers: The imported library.
        name: An ID of the hub, or a folder.
        pretrained: Load the weights; otherwise they are as initialised.

    Raises:
        UsageError: Weights are missing in the file.
    """
    auto, safe = transformers.AutoModelForCausalLM, {"trust_remote_code": False}
    if pretrained:
        model, report = auto.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **safe
        )
        missing = sorted(report["missing_keys"])
        if missing:
            raise UsageError(
                f"hf:{name} must hold a trained language model; its weights lack "
                f"{', '.join(missing[:3])}."
            )
    else:
        config = transformers.AutoConfig.from_pretrained(name, **safe)
        model = auto.from_config(config, dtype=torch.float32, **safe)
    encode, decode = _tokenizer(transformers, name)
    return Loaded(
        NextToken(model), vocabulary=vocabulary_of(model.config), encode=encode, decode=decode
    )


def _tokenizer(transformers: Any, name: str) -> tuple[Encode | None, Decode | None]:
    """Return the tokenizer of a model, or None where it has none that can be read."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception:  # each library of tokenizers raises types of its own
        return None, None

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return encode, tokenizer.decode


def vocabulary_of(config: Any) -> Vocabulary:
    """Return the vocabulary in a configuration of transformers.

    Attention that sees a window of tokens is causal attention up to that length.
    """
    text = config.get_text_config()
    lengths = [getattr(text, name, None) for name in _LENGTHS]
    begin = getattr(config, "bos_token_id", None)
    if isinstance(begin, list):
        begin = begin[0]
    return Vocabulary(
        text.vocab_size,
        min(length for length in (*lengths, _LONGEST) if isinstance(length, int)),
        begin,
    )


_LENGTHS = ("max_position_embeddings", "n_positions", "sliding_window")
_LONGEST = 2**17
"""Most tokens of a sequence of a model that states no limit."""
