"""Weights in a file: read without pickled code, checked against the network, hashed."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gdfq.errors import GdfqWarning, UsageError, first_line
from gdfq.files.untrusted import check_torch_file
from gdfq.models.checkpoints import pickled_module, read_checkpoint
from gdfq.models.file_kinds import foreign_kind, is_safetensors
from gdfq.models.state_dicts import Fit, few, fitted, is_plain, state_dicts


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of the model's state."""
    digest = hashlib.sha256()
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights_(model: nn.Module, path: Path) -> str:
    """Load the weights of a file into the model.

    The file may be a checkpoint as training scripts save it: a state dict under a key such as
    "state_dict", "model" or "params", also nested, with a prefix such as "module." before all
    names, and with optimizer states and options beside it. Of several that fit, the one of averaged
    weights ("ema", "model_ema", "params_ema") is taken, with a warning; between others the name of
    the file must choose, as "checkpoint.pt#student". Batch counters may be absent.

    Args:
        model: The network.
        path: A safetensors file or a torch file, perhaps with "#KEY" after its name.

    Returns:
        What was taken, for the user.

    Raises:
        UsageError: The file cannot be read without running code, no state dict in it fits, or
            several do.
    """
    path, chosen = _with_key(path)
    expected = {
        name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)
    }
    content = _read(path)
    found = [
        candidate for candidate in state_dicts(content) if chosen is None or chosen == candidate.key
    ]
    if not found:
        _refuse_content(path, content, chosen)
    fits = [fit for candidate in found for fit in fitted(candidate, expected)]
    good = [fit for fit in fits if not fit.problems]
    if not good:
        best = min(fits, key=lambda fit: fit.distance)
        raise UsageError(
            f"weights must match the network; in {path}{best.place} some are "
            f"{'; '.join(best.problems)}. {best.advice}"
        )
    taken = _chosen(path, good)
    model.load_state_dict(taken.tensors, strict=False)
    return f"{path}{taken.place}"


def _with_key(path: Path) -> tuple[Path, str | None]:
    """A file, and the key behind "#" in its name, if there is no file of the whole name."""
    name, mark, key = str(path).rpartition("#")
    if not mark or path.exists():
        return path, None
    return Path(name), key


def _chosen(path: Path, fits: Sequence[Fit]) -> Fit:
    """The one of several fitting state dicts that is taken."""
    first, *others = fits
    if all(first.equals(other) for other in others):
        return first
    averaged = [fit for fit in fits if fit.is_averaged]
    names = ", ".join(repr(fit.key + fit.prefix) for fit in fits)
    keys = f"Choose one as {path}#{first.key or 'KEY'}."
    if len(averaged) != 1:
        raise UsageError(
            f"one state dict of a file must fit the network; in {path} several do: {names}. {keys}"
        )
    warnings.warn(
        f"several state dicts of {path} fit the network: {names}. The averaged weights, "
        f"{averaged[0].key + averaged[0].prefix!r}, are taken. {keys}",
        GdfqWarning,
        stacklevel=3,
    )
    return averaged[0]


def _refuse_content(path: Path, content: object, chosen: str | None) -> NoReturn:
    """Refuse a file without a state dict, and say what it holds instead."""
    whole = {"": content, **(content if isinstance(content, dict) else {})}
    for key, value in whole.items():
        if kind := pickled_module(value):
            taken = f"[{key!r}]" if key else ""
            raise UsageError(
                f"weights must be a state dict; {path} holds a whole pickled module ({kind}), and "
                "reading it would run code. Where you trust the file: torch.save(torch.load(FILE, "
                f"weights_only=False){taken}.state_dict(), 'weights.pt')."
            )
    if chosen is not None:
        keys = ", ".join(repr(candidate.key) for candidate in state_dicts(content))
        raise UsageError(
            f"{path} must hold a state dict under {chosen!r}; it has {keys or 'none'}. Choose one."
        )
    raise UsageError(
        f"weights must be ordinary tensors by name, perhaps under 'state_dict'; {path} holds "
        f"a {type(content).__name__} of {_contents(content)}. Save model.state_dict()."
    )


def _read(path: Path) -> Any:
    """What a weights file holds, without running code."""
    if kind := foreign_kind(path):
        raise UsageError(
            f"weights must be a safetensors file or a torch state dict; {path} is neither: it is "
            f"{kind}."
        )
    if path.is_dir():
        raise UsageError(f"weights must be a file; {path} is a folder. Give a file in it.")
    if not path.is_file():
        raise UsageError(f"there is no weights file at {path}.")
    with _refused_if_unreadable(path):
        return load_file(path) if is_safetensors(path) else read_checkpoint(path)


@contextmanager
def _refused_if_unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch.load raises types of every kind for broken files
        if "STACK_GLOBAL" in str(error):
            raise UsageError(
                f"weights must be saved with torch.save's own pickle protocol, 2; {path} has a "
                "later one, which is not read without running code. Save model.state_dict() again."
            ) from error
        if "Weights only load failed" in str(error):
            raise UsageError(
                "weights must be a safetensors file or a torch state dict without pickled code; "
                f"beside the tensors {path} holds an object that cannot be read without running "
                "code. Save model.state_dict() alone."
            ) from error
        raise UsageError(
            "weights must be a safetensors file or a torch state dict without pickled code; "
            f"{path} is neither: {first_line(error)}"
        ) from error


def _contents(state: object) -> str:
    return few([str(key) for key in state]) if isinstance(state, dict) else "something else"


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or a torch state dict; pickled code is refused.

    Stricter than `load_weights_`: what passes is harmless to a library that reads it again, with
    pickle.
    """
    if not path.is_file():
        raise UsageError(f"there is no weights file at {path}.")
    with _refused_if_unreadable(path):
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            check_torch_file(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and is_plain(value) for name, value in state.items()
    ):
        raise UsageError(
            f"weights must be ordinary tensors by name, perhaps under 'state_dict'; {path} holds "
            f"a {type(state).__name__} of {_contents(state)}. Save model.state_dict()."
        )
    return state
