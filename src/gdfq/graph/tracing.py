"""Running a private copy of a user's network, and tracing it with `torch.export`."""

import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from gdfq.errors import UsageError, first_line
from gdfq.execution.tracing import exclusive_tracing
from gdfq.graph.decompositions import DECOMPOSED
from gdfq.graph.inputs import InputSpec, takes_images
from gdfq.graph.names import safe_paths
from gdfq.graph.private_copy import private_copy


@dataclass(frozen=True, eq=False)
class Arguments:
    """What a network is called with: tensors by position, or by name."""

    positional: tuple[Tensor, ...]
    named: Mapping[str, Tensor]

    def with_entries(self, count: int) -> "Arguments":
        """Return arguments with the given number of entries, repeated from the start if needed."""

        def part(tensor: Tensor) -> Tensor:
            return tensor[torch.arange(count) % len(tensor)]

        return Arguments(
            tuple(map(part, self.positional)), {name: part(x) for name, x in self.named.items()}
        )

    def shortened(self, length: int) -> "Arguments":
        """Return arguments with the first `length` tokens of each sequence."""
        return Arguments(
            tuple(x[:, :length] for x in self.positional),
            {name: x[:, :length] for name, x in self.named.items()},
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors in the order of the network's inputs."""
        return (*self.positional, *self.named.values())


class Trial:
    """A private copy of a network that runs, in float32 and without gradients."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        with exclusive_tracing():  # a copy of a .pt2 file's program warns
            self._network = private_copy(model)

    def __call__(self, arguments: Arguments) -> object:
        """Return what the network returns; the global random state stays as it is."""
        with torch.no_grad(), _in_float32():
            return self._network(*arguments.positional, **arguments.named)

    def _has_places_for(self, arguments: Arguments) -> bool:
        """Whether the network can be called with so many tensors, by these names."""
        try:
            inspect.signature(self._network.forward).bind(*arguments.positional, **arguments.named)
        except TypeError:
            return False
        return True

    def first(self, arguments: Arguments, specs: Sequence[InputSpec], entries: int) -> object:
        """Return what the network returns.

        Args:
            arguments: What it is called with.
            specs: What its inputs are.
            entries: How many of the arguments' entries the user gave; for the error.

        Raises:
            UsageError: It does not accept the arguments.
        """
        try:
            return self(arguments)
        except Exception as error:
            if takes_images(specs):
                taken = f"an input of {'x'.join(map(str, specs[0].shape))}"
            else:
                taken = f"inputs {', '.join(map(str, specs))}"
            advice = (
                _shape_advice(specs, entries)
                if self._has_places_for(arguments)
                else "Give a tensor for each of its inputs: example_input, of gdfq.quantize in "
                "Python."
            )
            raise UsageError(
                f"the network must accept {taken}; it failed with: {first_line(error)}. {advice}"
            ) from error

    def changed_by(self, arguments: Arguments) -> list[str]:
        """Return the names of the tensors that the first call of a network changes."""
        trial = Trial(self._model)
        before = {name: tensor.clone() for name, tensor in _named(trial._network).items()}
        trial(arguments)
        after = _named(trial._network)
        return [name for name, tensor in after.items() if not _same(tensor, before.get(name))]


def _shape_advice(specs: Sequence[InputSpec], entries: int) -> str:
    """What to do about a shape that a network does not accept."""
    shape = specs[0].shape
    if takes_images(specs) and len(shape) == 4 and shape[0] == 1:
        return f"The shape is given without the batch: {'x'.join(map(str, shape[1:]))}."
    if takes_images(specs) and len(shape) == 2 and entries > 1:
        return (
            f"An example needs the batch first; got {[entries, *shape]}. Give x[None] of one image "
            "x, or --input CxHxW."
        )
    return (
        "Give the shape it was trained on (--input CxHxW, or example_input with the batch first: "
        "x[None] of one image x)."
    )


def _named(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.named_parameters()) | dict(network.named_buffers())


def _same(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.equal(tensor, other)


_NUMBERS_TRACED = (0, 7)
"""Numbers of entries to trace with; 0 means as many as there are. The second is for networks that
remember the shape of their last call, which may have been that of the first."""


def trace(model: nn.Module, arguments: Arguments, dynamic: Sequence[int] = (0,)) -> fx.GraphModule:
    """Export a network as a graph of ATen operators that takes any number of entries.

    Args:
        model: The network.
        arguments: What it is called with.
        dynamic: Dimensions of its inputs that may have any size.

    Raises:
        UsageError: `torch.export` cannot trace it.
    """
    failed: Exception | None = None
    for count in _NUMBERS_TRACED:
        given = arguments.with_entries(count) if count else arguments
        # torch.export prints the graph so far when it fails: the message says all that helps.
        with exclusive_tracing(), redirect_stderr(StringIO()) as printed:
            try:
                # A copy of its own: a network may remember the shapes of its last call.
                network = _exported(private_copy(model), given, dynamic)
            except Exception as error:
                failed = failed or error
                continue
        if text := printed.getvalue():  # the network's own
            sys.stderr.write(text)
        return network
    assert failed is not None
    lengths = " and any length" if 1 in dynamic else ""
    raise UsageError(
        f"the network must be traceable by torch.export with any batch size{lengths}; tracing "
        f"failed with: {first_line(failed)}{_place_of(failed)}. "
        "Make its forward independent of the values and of the length of the batch."
    ) from failed


def _place_of(error: Exception) -> str:
    """Return the last line of the user's own code that led to an error, in words."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame.filename)]
    return f", at {own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else ""


_TORCH, _GDFQ = Path(torch.__file__).parent, Path(__file__).parents[1]
_PYTHON = Path(inspect.__file__).parent


def _is_own(filename: str) -> bool:
    """Return whether a file is neither of PyTorch, nor of this package, nor of Python itself."""
    path = Path(filename)
    of_python = path.is_relative_to(_PYTHON) and "site-packages" not in path.parts
    return path.is_file() and not (
        of_python or path.is_relative_to(_TORCH) or path.is_relative_to(_GDFQ)
    )


def _exported(network: nn.Module, arguments: Arguments, dynamic: Sequence[int]) -> fx.GraphModule:
    with _in_float32():
        program = torch.export.export(
            network,
            arguments.positional,
            dict(arguments.named),
            dynamic_shapes=_dynamic(
                network, arguments, dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC)
            ),
        )
    _rename_tensors_(program)
    # Few operators are decomposed; the rest takes functional form: x.add_(y) is x + y.
    module = program.run_decompositions(dict(DECOMPOSED)).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def _dynamic(network: nn.Module, arguments: Arguments, dynamic: Mapping[int, Any]) -> Any:
    """Return which dimensions of the inputs are dynamic, in the form that export expects."""
    if arguments.named:
        return dict.fromkeys(arguments.named, dynamic)
    count = len(arguments.positional)
    parameters = inspect.signature(network.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return ((dynamic,) * count,) if len(parameters) == 1 else (dynamic,) * count
    return (dynamic,) * count


def _rename_tensors_(program: torch.export.ExportedProgram) -> None:
    """Give the tensors of a program names that a graph can hold."""
    signature = program.graph_signature
    specs: list[Any] = [*signature.input_specs, *signature.output_specs]
    names = [spec.target for spec in signature.input_specs if isinstance(spec.target, str)]
    safe = safe_paths(dict.fromkeys([*names, *program.state_dict, *program.constants]))
    if all(old == new for old, new in safe.items()):
        return
    for spec in specs:
        if isinstance(spec.target, str):
            spec.target = safe.get(spec.target, spec.target)
    for tensors in (program.state_dict, program.constants):
        for old in list(tensors):
            tensors[safe[old]] = tensors.pop(old)


_FLOAT32: Mapping[Any, Any] = {
    torch.float64: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    Tensor.double: Tensor.float,
    Tensor.half: Tensor.float,
    Tensor.bfloat16: Tensor.float,
    Tensor.data.__get__: Tensor.detach,  # type: ignore[attr-defined]
    "torch.DoubleTensor": "torch.FloatTensor",
    "torch.HalfTensor": "torch.FloatTensor",
    "torch.BFloat16Tensor": "torch.FloatTensor",
}


class _Float32Mode(TorchFunctionMode):
    """Where a network asks for another floating-point type, it gets float32."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del types
        args = tuple(_in_32(value) for value in args)
        kwargs = {name: _in_32(value) for name, value in (kwargs or {}).items()}
        return _FLOAT32.get(function, function)(*args, **kwargs)


def _in_32(value: Any) -> Any:
    return _FLOAT32.get(value, value) if isinstance(value, torch.dtype | str) else value


@contextmanager
def _in_float32() -> Iterator[None]:
    """Within this context networks compute in float32, and global random states are restored."""
    with torch.random.fork_rng(devices=[]), _Float32Mode():
        yield
