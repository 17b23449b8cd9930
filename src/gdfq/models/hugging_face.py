"""Folders of causal language models of transformers, without and with their weights."""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from gdfq.errors import UsageError, first_line
from gdfq.files.untrusted import parse_json

WEIGHTS_FILE = "model.safetensors"
_HUB = "hf:"
_SAFE = {"trust_remote_code": False}


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A causal language model without its weights.

    Attributes:
        config_file: Name of the file of its configuration.
        files: Contents of that file and, where it has them, of its tokenizer and settings of
            generation, by file name.
        shapes: Shapes of its tensors by name.
        linear: Names of its linear layers.
        embedding: Name of the table of its token embedding.
        head: Name of the weight of its head.
        ties: Whether head and embedding are one tensor.
    """

    config_file: str
    files: Mapping[str, bytes]
    shapes: Mapping[str, tuple[int, ...]]
    linear: tuple[str, ...]
    embedding: str
    head: str
    ties: bool

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, as plain values."""
        found: dict[str, Any] = parse_json(self.files[self.config_file])
        return found

    @classmethod
    def of(cls, model: str) -> "Skeleton":
        """Read the skeleton of a model; its weights are not read.

        Args:
            model: `hf:ID` or `hf:FOLDER`.

        Raises:
            UsageError: It is no causal language model that transformers can load.
        """
        name = model.removeprefix(_HUB)
        if name == model:
            raise UsageError(
                f"the original must be a language model of transformers, as hf:ID or hf:FOLDER; "
                f"got {model!r}."
            )
        transformers = importlib.import_module("transformers")
        auto = transformers.AutoModelForCausalLM
        try:
            with quiet_loading(), TemporaryDirectory() as place:
                config = transformers.AutoConfig.from_pretrained(name, **_SAFE)
                config.save_pretrained(place)
                _save_others(transformers, name, place)
                files = {path.name: path.read_bytes() for path in Path(place).iterdir()}
                with torch.device("meta"):
                    module = auto.from_config(config, **_SAFE)
        except Exception as error:  # each library raises types of its own
            raise UsageError(
                f"the original must be a causal language model that transformers can load; of "
                f"{model} it says: {first_line(error)}"
            ) from error
        return cls(
            str(transformers.utils.CONFIG_NAME),
            files,
            {key: tuple(value.shape) for key, value in module.state_dict().items()},
            tuple(key for key, part in module.named_modules() if isinstance(part, nn.Linear)),
            _weight_name(module, module.get_input_embeddings()),
            _weight_name(module, module.get_output_embeddings()),
            bool(config.get_text_config().tie_word_embeddings),
        )


def _save_others(transformers: Any, name: str, place: str) -> None:
    """Save the tokenizer and the settings of generation of a model, where it has them."""
    for kind in (transformers.AutoTokenizer, transformers.GenerationConfig):
        try:
            kind.from_pretrained(name, **_SAFE).save_pretrained(place)
        except Exception:  # noqa: S112 (many folders have none, and each library raises its own)
            continue


def _weight_name(module: nn.Module, part: nn.Module) -> str:
    return next(f"{name}.weight" for name, found in module.named_modules() if found is part)


def load_folder(folder: Path) -> nn.Module:
    """Load a causal language model from a folder, in float32, quantized or not.

    Raises:
        Exception: Whatever transformers raises for a folder that it cannot load.
    """
    transformers = importlib.import_module("transformers")
    with quiet_loading():
        module, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **_SAFE
        )
    missing = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if missing:
        raise ValueError(f"the tensors {', '.join(missing[:3])} are missing or not read")
    found: nn.Module = module.eval()
    return found


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from showing bars of its own progress."""
    bars = importlib.import_module("transformers").utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
