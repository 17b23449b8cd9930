"""Weights in a file: read without pickled code, checked against the network, hashed."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdfq.errors import UsageError, first_line
from gdfq.files.untrusted import check_torch_file


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of the model's state."""
    digest = hashlib.sha256()
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights_(model: nn.Module, path: Path) -> None:
    """Load the weights of a file into the model. The file must have exactly its tensors."""
    given = read_weights(path)
    wanted = {
        name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)
    }
    if all(name.startswith("module.") for name in given) and not given.keys() <= wanted.keys():
        given = {name.removeprefix("module."): tensor for name, tensor in given.items()}
    missing = [n for n in wanted if n not in given and not n.endswith("num_batches_tracked")]
    surplus = [n for n in given if n not in wanted]
    shapes = [
        f"{n} {list(given[n].shape)} for {list(wanted[n].shape)}"
        for n in wanted
        if n in given and given[n].shape != wanted[n].shape
    ]
    types = [
        f"{n} {given[n].dtype} for {wanted[n].dtype}"
        for n in wanted
        if n in given and not torch.can_cast(given[n].dtype, wanted[n].dtype)
    ]
    problems = [
        f"{what}: {_few(names)}"
        for what, names in (
            ("missing", missing),
            ("surplus", surplus),
            ("of another shape", shapes),
            ("of another type", types),
        )
        if names
    ]
    if problems:
        raise UsageError(
            f"weights must match the network; in {path} some are {'; '.join(problems)}. "
            "Check that MODEL and --weights belong together."
        )
    model.load_state_dict(given, strict=False)


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _contents(state: object) -> str:
    return _few([str(key) for key in state]) if isinstance(state, dict) else "something else"


def _is_plain(value: object) -> bool:
    """Return whether it is a dense tensor in memory."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or a torch state dict; pickled code is refused."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise UsageError(f"there is no weights file at {path}.")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            check_torch_file(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises types of every kind for broken files
        raise UsageError(
            "weights must be a safetensors file or a torch state dict without pickled code; "
            f"{path} is neither: {first_line(error)}"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and _is_plain(value) for name, value in state.items()
    ):
        raise UsageError(
            f"weights must be ordinary tensors by name, perhaps under 'state_dict'; {path} holds "
            f"a {type(state).__name__} of {_contents(state)}. Save model.state_dict()."
        )
    return state
