"""Networks that are code: a factory in a file or package, a `torch.export` program.

Loading either can run its code. They come only from the MODEL that a user names, never from a run
folder.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from gdfq.errors import UsageError, first_line
from gdfq.models.hubs import HUBS
from gdfq.models.loaded import Loaded


def from_factory(spec: str) -> nn.Module:
    """Import a file or package and call its factory.

    Args:
        spec: `path/to/file.py:factory` or `package.module:factory`.

    Raises:
        UsageError: The spec is malformed, the import or the call fails, or the factory does not
            return an nn.Module.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UsageError(
            f"{_missing(spec)} MODEL is path/to/file.py:factory, package.module:factory, "
            "program.pt2, timm:NAME, torchvision:NAME, hf:ID, ptcv:NAME or diffusers:ID; "
            f"got {spec!r}."
        )
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise UsageError(f"MODEL names a file that must exist; there is none at {place}.")
    # As when Python runs them: a file can import its neighbours, a package is found from here.
    with _importable_from(Path(place).parent if is_file else Path()):
        try:
            module = _import_file(Path(place)) if is_file else importlib.import_module(place)
        except Exception as error:
            near = get_close_matches(place, HUBS, n=1)
            if near and isinstance(error, ModuleNotFoundError) and error.name == place:
                raise UsageError(
                    f"MODEL must begin with a library, a package or a file; there is no {place!r}. "
                    f"Did you mean {near[0]}:{name}?"
                ) from error
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


def _missing(spec: str) -> str:
    """What a MODEL without a library or a factory lacks."""
    if spec.endswith(".py"):
        return f"{spec} needs the name of a factory: {spec}:NAME."
    if os.path.isdir(spec):  # False for what can be no path
        return f"{spec} is a folder; give it as hf:FOLDER or diffusers:FOLDER."
    if spec.isidentifier():
        return f"{spec} needs its library: timm:{spec} or torchvision:{spec}, for instance."
    return "MODEL must name a library, a factory or a program."


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


def from_program(path: Path) -> Loaded:
    """Load the network of a `.pt2` file that `torch.export.save` wrote, with its input shape.

    Raises:
        UsageError: It is not such a file, takes more than one tensor, or was exported for a fixed
            batch size or in training mode.
    """
    if not path.is_file():
        raise UsageError(f"MODEL names a file that must exist; there is none at {path}.")
    try:
        program = torch.export.load(path)
    except Exception as error:  # zip, pickle and schema errors of many types
        raise UsageError(
            "a .pt2 file must be a program that torch.export.save wrote, with a torch that this "
            f"one ({torch.__version__}) can read; {path} is not: {first_line(error)}."
        ) from error
    signature = program.graph_signature
    inputs = [node for node in program.graph.nodes if node.name in signature.user_inputs]
    if len(inputs) != 1 or len(signature.user_inputs) != 1:
        raise UsageError(
            f"a program must take one tensor, the images; {path} takes "
            f"{len(signature.user_inputs)} inputs. Export a module that takes the images alone."
        )
    if any(_trains(node) for node in program.graph.nodes):
        raise UsageError(
            f"a program must be exported in evaluation mode; {path} was exported in training "
            "mode. Call model.eval() before torch.export.export."
        )
    batch, *shape = inputs[0].meta["val"].shape
    if isinstance(batch, int):
        raise UsageError(
            f"a program must take any batch size; {path} takes {batch} alone. Export it with "
            "dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) and an example of two images."
        )
    fixed = all(isinstance(size, int) for size in shape)
    return Loaded(_plain(program.module(check_guards=False)), tuple(shape) if fixed else None)


def _trains(node: fx.Node) -> bool:
    """Return whether a node is a batch norm or dropout in training mode."""
    flag = {
        torch.ops.aten.batch_norm.default: 5,
        torch.ops.aten.dropout.default: 2,
    }.get(node.target)  # type: ignore[call-overload]
    return flag is not None and bool(node.args[flag])


def _plain(module: Any) -> nn.Module:
    """Return a program's module as one that can be copied and set to evaluation mode."""
    graph = module.graph
    (output,) = graph.find_nodes(op="output")
    if graph._codegen.pytree_info.out_spec.is_leaf():  # one tensor needs no code that packs it
        output.args = (output.args[0][0],)
        graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(module, graph)
