"""Where a network comes from: a factory in a file or package, and its weights in a file."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdfq.errors import UsageError, first_line


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
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _factory(spec: str) -> nn.Module:
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UsageError(
            "MODEL is path/to/file.py:factory or package.module:factory, a callable that returns "
            f"an nn.Module; got {spec!r}."
        )
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise UsageError(f"MODEL names a file that must exist; there is none at {place}.")
    # A file finds its neighbours, a package is found from here: as when Python runs them.
    with _importable_from(Path(place).parent if is_file else Path()):
        try:
            module = _import_file(Path(place)) if is_file else importlib.import_module(place)
        except Exception as error:
            raise UsageError(f"{place} must be importable; it failed with: {error!r}.") from error
        factory = getattr(module, name, None)
        if not callable(factory):
            found = f"is a {type(factory).__name__}" if hasattr(module, name) else "is not there"
            raise UsageError(f"MODEL must name a callable; {name!r} {found} in {place}.")
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


@contextmanager
def _importable_from(folder: Path) -> Iterator[None]:
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"_gdfq_model_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def load_weights_(model: nn.Module, path: Path) -> None:
    """Load a file's weights into the model; all must be there, and no others."""
    given = _read_weights(path)
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


def _contents(state: object) -> str:
    return _few([str(key) for key in state]) if isinstance(state, dict) else "something else"


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not path.is_file():
        raise UsageError(f"there is no weights file at {path}.")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises types of every kind for broken files
        raise UsageError(
            "weights must be a safetensors file or a torch state dict without pickled code; "
            f"{path} is neither: {first_line(error)}"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UsageError(
            f"weights must be a dictionary of tensors, perhaps under 'state_dict'; {path} holds "
            f"a {type(state).__name__} of {_contents(state)}. Save model.state_dict()."
        )
    return state
