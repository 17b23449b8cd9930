"""Functions of tensors that a GPU replays as CUDA graphs.

A step of a small network is thousands of kernels of a few microseconds each. Python launches them
more slowly than a GPU computes them; a CUDA graph launches all of them at once.
"""

import gc
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gdfq.errors import GdfqWarning, first_line


def calls_before_replay(device: torch.device) -> int:
    """Return how many first calls of a step take longer than those that follow.

    On a GPU the second one is recorded, which takes longer than the step itself.
    """
    return 2 if device.type == "cuda" else 1


class Replayed:
    """A differentiable function of tensors, computed as it is except on a GPU.

    There the first call with inputs of some shapes is computed as it is, the second one is also
    recorded, forward and backward, and later ones are replayed. What cannot be recorded is computed
    as it is, with a warning.

    A replay calls no Python. So the function must do the same for all inputs of the same shapes: it
    draws no random numbers on the CPU, changes nothing but what it returns, and reads no number of
    the GPU. The gradients of parameters lie where the next replay writes them: they must be used
    before, and not be summed over calls. Nothing may be left of the first call's graph of gradients
    when the second is made: what was differentiated in it waits for streams that are not recorded.

    Args:
        function: Takes tensors, or None where there is none, and returns nested tensors.
        parameters: All tensors with gradients that it reads besides its inputs.
    """

    def __init__(
        self, function: Callable[..., Any], parameters: Iterable[nn.Parameter] = ()
    ) -> None:
        self._function = function
        self._parameters = [p for p in parameters if p.requires_grad]
        self._recorded: dict[Any, Callable[..., Any] | None] = {}

    def __call__(self, *inputs: Tensor | None) -> Any:
        tensors = [x for x in inputs if x is not None]
        if not tensors or any(x.device.type != "cuda" for x in tensors):
            return self._function(*inputs)
        key = (torch.is_grad_enabled(), *map(_facts, inputs))
        if key not in self._recorded:
            self._recorded[key] = None  # it may be the only one: a recording takes several calls
            return self._function(*inputs)
        if self._recorded[key] is None:
            self._recorded[key] = self._record(inputs)
        recorded = self._recorded[key]
        assert recorded is not None
        return recorded(*inputs)

    def forget(self) -> None:
        """Free the memory of the recordings."""
        if any(recorded is not None for recorded in self._recorded.values()):
            self._recorded.clear()
            gc.collect()  # PyTorch's recordings refer to themselves

    def _record(self, inputs: tuple[Tensor | None, ...]) -> Callable[..., Any]:
        """Return a function that replays what is computed for inputs of these shapes."""
        present = [index for index, x in enumerate(inputs) if x is not None]
        call = _Call(self._function, len(inputs), present, self._parameters)
        samples = tuple(_sample(x) for x in inputs if x is not None)
        try:
            # Recorded results keep their graph of gradients, which says where they were recorded.
            # PyTorch would warn of that later; what it warned of before cannot be asked for.
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
            with torch.cuda.stream(torch.cuda.current_stream()):  # restored if recording fails
                replay = torch.cuda.make_graphed_callables(call, samples, allow_unused_input=True)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            warnings.warn(
                "a step must be recorded to be replayed as a CUDA graph; its kernels are launched "
                f"one by one instead, which is slower ({first_line(error)}).",
                GdfqWarning,
                stacklevel=2,
            )
            return self._function

        def replayed(*inputs: Tensor | None) -> Any:
            found, form = pytree.tree_flatten(replay(*(inputs[index] for index in present)))
            # The next replay writes to the same memory. PyTorch marks all results as having a
            # gradient.
            own = [
                (x if has_gradient else x.detach()).clone()
                for x, has_gradient in zip(found, call.has_gradient, strict=True)
            ]
            return pytree.tree_unflatten(own, form)

        return replayed


class _Call(nn.Module):
    """A function as a module with parameters, which is what PyTorch records.

    `has_gradient` says which of its results have one.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        count: int,
        present: list[int],
        parameters: Iterable[nn.Parameter],
    ) -> None:
        super().__init__()
        self._function, self._count, self._present = function, count, present
        self.read = nn.ParameterList(parameters)
        self.has_gradient: list[bool] = []

    def forward(self, *tensors: Tensor) -> Any:
        inputs: list[Tensor | None] = [None] * self._count
        for index, tensor in zip(self._present, tensors, strict=True):
            inputs[index] = tensor
        found = self._function(*inputs)
        self.has_gradient = [x.requires_grad for x in pytree.tree_leaves(found)]
        return found


def _facts(x: Tensor | None) -> Any:
    """Return what a recording depends on."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.requires_grad)


def _sample(x: Tensor) -> Tensor:
    """Return a copy of an input, into which those of replays are written."""
    return torch.empty_like(x).copy_(x.detach()).requires_grad_(x.requires_grad)
