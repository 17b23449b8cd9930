"""Where a network comes from: a factory in a file or package, and its weights in a file."""

import hashlib
import importlib
import importlib.util
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdfq.errors import UsageError


def load_model(spec: str, weights: str | Path | None = None) -> nn.Module:
    """Call the factory and load the weights.

    spec: `path/to/file.py:factory` or `package.module:factory`; this runs that code.
    weights: a safetensors file or a torch state dict (read with weights_only), with or without a
    `module.` prefix or a `state_dict` key around it; `num_batches_tracked` may be absent.

    Raises UsageError when any of it is missing or does not fit.
    """
    model = _factory(spec)
    if weights is not None:
        load_weights_(model, Path(weights))
    return model


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of the model's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _factory(spec: str) -> nn.Module:
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UsageError(
            "MODEL is path/to/file.py:factory or package.module:factory, a callable that returns "
            f"an nn.Module; got {spec!r}."
        )
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    if not hasattr(module, name):
        raise UsageError(f"MODEL must name a factory; {place} has no {name!r}.")
    factory = getattr(module, name)
    if not callable(factory):
        raise UsageError(f"MODEL must name a callable; {spec} is a {type(factory).__name__}.")
    try:
        model = factory()
    except Exception as error:
        raise UsageError(
            f"the factory {spec} must run without arguments; it failed with: {error!r}."
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"the factory {spec} must return an nn.Module; it returned a {type(model).__name__}."
        )
    return model


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"MODEL names a file that must exist; there is none at {path}.")
    module_spec = importlib.util.spec_from_file_location(f"_gdfq_model_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickling look modules up by name
    sys.path.insert(0, str(path.parent.resolve()))  # its neighbours, as when it is run
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path} must be importable; it failed with: {error!r}.") from error
    finally:
        sys.path.pop(0)
    return module


def _import_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UsageError(
            f"the module {name!r} must be importable; it failed with: {error!r}."
        ) from error


def load_weights_(model: nn.Module, path: Path) -> None:
    """Load a file's weights into the model; all must be there, and no others."""
    given = _read_weights(path)
    wanted = model.state_dict()
    missing = [n for n in wanted if n not in given and not n.endswith("num_batches_tracked")]
    surplus = [n for n in given if n not in wanted]
    shapes = [
        f"{n} {list(given[n].shape)} for {list(wanted[n].shape)}"
        for n in wanted
        if n in given and given[n].shape != wanted[n].shape
    ]
    problems = [
        f"{what}: {_few(names)}"
        for what, names in (
            ("missing", missing),
            ("surplus", surplus),
            ("of another shape", shapes),
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


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UsageError(f"there is no weights file at {path}.")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
    ) as error:
        raise UsageError(
            "weights must be a safetensors file or a torch state dict without pickled code; "
            f"{path} is neither: {str(error).splitlines()[0]}"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UsageError(
            f"weights must be a dictionary of tensors; {path} holds a {type(state).__name__} "
            "of something else. Save model.state_dict()."
        )
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
