"""A GPU that is simulated on the CPU, so that tests find mixtures of devices without one.

A tensor of the simulated GPU says that its device is `cuda:0`; its values are computed on the CPU.
So code with data-dependent control flow (`item`, `nonzero`, searches) runs as it does on a GPU.
PyTorch's fake tensors decide about each call of an operator: what a GPU refuses, such as a sum of
tensors of two devices, raises an error here, too. Fake tensors alone would not do: without CUDA
they have no backward pass, and they have no numbers to branch on.

What is not simulated: the GPU's kernels with their rounding, memory and streams, several GPUs,
operators that one of the devices lacks, and extensions of C++ that read memory (ONNX Runtime gets
tensors of the CPU anyway).
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import repeat
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
_STAND_IN = torch.device("meta", 1)
"""What C++ sees instead of the GPU: a device that every build of PyTorch has. Tensors that are
really on the meta device have no index."""


class GpuTensor(Tensor):
    """A tensor of the simulated GPU; `numbers` are its values, on the CPU."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "GpuTensor":
        made: GpuTensor = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=_STAND_IN,
        )
        made.numbers = values
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"GpuTensor({self.numbers!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} on a tensor of the simulated GPU outside of `simulated_gpu`")


@contextmanager
def simulated_gpu() -> Iterator[None]:
    """Within this context the device "cuda" is there, simulated on the CPU.

    A call of an operator that a GPU refuses raises RuntimeError.
    """
    answers: dict[str, Any] = {
        "is_bf16_supported": True,
        "mem_get_info": (2**33, 2**34),
        "max_memory_reserved": 0,
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, a=answer, **__: a))
        stack.enter_context(patch.object(torch.cuda, "is_available", _asked_by_gdfq))
        stack.enter_context(patch.object(torch.cuda, "current_stream", lambda: None))
        stack.enter_context(patch.object(torch.cuda, "stream", lambda _: nullcontext()))
        stack.enter_context(patch.object(torch.cuda, "make_graphed_callables", _recorded))
        stack.enter_context(patch.object(torch.autograd, "_engine_run_backward", _run_backward))
        stack.enter_context(_Operators())
        stack.enter_context(_Names())
        yield


def values_of(tensor: Tensor) -> Tensor:
    """Return a tensor of the CPU with the numbers of a tensor of either device."""
    return tensor.numbers if isinstance(tensor, GpuTensor) else tensor


def _asked_by_gdfq() -> bool:
    """Return whether this package, or `torch.autocast`, asks for CUDA; others would start it."""
    asks = str(sys._getframe(1).f_globals["__name__"])
    return asks.startswith(("gdfq.", "torch.cuda.amp"))


_recording = False
"""Whether a CUDA graph is recorded, in which the CPU gets no number."""


def _recorded(call: Any, samples: tuple[Tensor, ...], *, allow_unused_input: bool) -> Any:
    """Return the call itself, after its forward and backward pass were tried as a recording."""
    global _recording
    _recording = True
    try:
        found = [x for x in tree_leaves(call(*samples)) if x.requires_grad]
        read = [x for x in (*samples, *call.parameters()) if x.requires_grad]
        if found:
            torch.autograd.grad(
                found, read, [torch.ones_like(x) for x in found], allow_unused=allow_unused_input
            )
    finally:
        _recording = False
    return call


_NARROW = frozenset(
    {
        *("conv1d", "conv2d", "conv3d", "conv_tbc", "convolution", "linear", "matmul", "mm", "mv"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "bmm", "baddbmm", "addmm"),
        *("addmv", "addr", "addbmm", "einsum", "prelu", "scaled_dot_product_attention"),
        *("chain_matmul", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    }
)
"""What `torch.autocast` computes in its narrow type on a GPU, by PyTorch's documentation."""
_WIDE = frozenset(
    {
        *("acos", "asin", "cosh", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal"),
        *("rsqrt", "sinh", "tan", "pow", "softplus", "layer_norm", "group_norm", "norm", "softmax"),
        *("log_softmax", "cosine_similarity", "cumprod", "cumsum", "dist", "prod", "sum", "renorm"),
        *("kl_div", "cross_entropy", "nll_loss", "mse_loss", "smooth_l1_loss", "l1_loss", "cdist"),
    }
)
"""What it computes in float32 there."""


def _autocast(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments in the types that `torch.autocast` gives them on a GPU."""
    name = str(getattr(func, "__name__", "")).partition(".")[0]
    if name not in _NARROW | _WIDE or not torch.is_autocast_enabled("cuda"):
        return args, kwargs
    dtype = torch.get_autocast_dtype("cuda") if name in _NARROW else torch.float32

    def cast(value: Any) -> Any:
        is_changed = isinstance(value, GpuTensor) and value.is_floating_point()
        return value.to(dtype) if is_changed and value.dtype != torch.float64 else value

    return _mapped(cast, args), _mapped(cast, kwargs)


_run_backward_as_is = torch.autograd.graph._engine_run_backward


def _run_backward(*args: Any, **kwargs: Any) -> Any:
    """Run a backward pass, which may compute segments of the forward pass again, with `_Names`."""
    with _Names():
        return _run_backward_as_is(*args, **kwargs)


class _Names(TorchFunctionMode):
    """Replaces the GPU in arguments by its stand-in before PyTorch looks for CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = _mapped(_stand_in, args), _mapped(_stand_in, kwargs or {})
        if func is Tensor.cuda:
            return args[0].to(_STAND_IN)
        if func is Tensor.tolist and isinstance(args[0], GpuTensor):
            return args[0].cpu().tolist()
        if func is torch.unravel_index and isinstance(args[0], GpuTensor):
            # It is written in Python, in which the GPU's name is not replaced again.
            return tuple(found.to(_STAND_IN) for found in func(args[0].cpu(), *args[1:], **kwargs))
        if func is Tensor.new_tensor and isinstance(args[0], GpuTensor):
            kwargs = {"dtype": args[0].dtype, "device": _STAND_IN, **kwargs}
            func, args = torch.tensor, args[1:]
        if func in {torch.tensor, torch.as_tensor} and _is_stand_in(kwargs.get("device")):
            # The stand-in holds no numbers, so PyTorch would not read them.
            return func(*args, **{**kwargs, "device": CPU}).to(_STAND_IN)
        args, kwargs = _autocast(func, args, kwargs)
        return func(*args, **kwargs)


_CHECKED: dict[Any, Iterable[bool]] = {}
"""Which results are on the GPU, by operator and what matters of its arguments: fakes are slow."""


class _Operators(TorchDispatchMode):
    """Checks the devices of each operator, then computes it on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [*_leaves(args), *_leaves(kwargs)]
        if not any(isinstance(leaf, GpuTensor) or _is_stand_in(leaf) for leaf in leaves):
            return func(*args, **kwargs)
        if _recording and (func in _READS or _changes_device(args, kwargs)):
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        key = (func, *map(_facts, leaves))
        if key not in _CHECKED:
            with torch._C.DisableTorchFunction():  # fake tensors know the GPU by its name
                _CHECKED[key] = _on_gpu(func, args, kwargs)
        places = iter(_CHECKED[key])

        def placed(value: Any) -> Any:
            return GpuTensor(value) if isinstance(value, Tensor) and next(places) else value

        found = _mapped(placed, func(*_mapped(_plain, args), **_mapped(_plain, kwargs)))
        return return_and_correct_aliasing(func, args, kwargs, found)


_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


def _changes_device(args: Any, kwargs: Any) -> bool:
    """Return whether a call copies a tensor from one device to the other."""
    tensors = [leaf for leaf in _leaves(args) if isinstance(leaf, Tensor)]
    target = kwargs.get("device")
    to_gpu = target is not None and _is_stand_in(target)
    if len(tensors) == 1 and target is not None:
        return to_gpu != isinstance(tensors[0], GpuTensor)
    return False


def _on_gpu(func: Any, args: Any, kwargs: Any) -> Iterable[bool]:
    """Return which tensors among an operator's results are on the GPU.

    Raises:
        RuntimeError: A GPU refuses these devices.
    """
    _check_what_fakes_allow(func, args, kwargs)
    tensors = [leaf for leaf in (*_leaves(args), *_leaves(kwargs)) if isinstance(leaf, Tensor)]
    if func._schema.name in _INDEX and any(tensor.dtype == torch.bool for tensor in tensors):
        return repeat(True)  # only the mask's numbers say how many elements there are
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    fakes = {id(tensor): _fake(tensor, mode) for tensor in tensors}

    def faked(value: Any) -> Any:
        if isinstance(value, Tensor):
            return fakes[id(value)]
        return GPU if _is_stand_in(value) else value

    try:
        with mode:
            found = func(*_mapped(faked, args), **_mapped(faked, kwargs))
    except (DataDependentOutputException, DynamicOutputShapeException):
        # The result is a number, which Python gets, or has a shape that follows from the numbers.
        _check_one_device(func, tensors)
        return repeat(True)
    except RuntimeError as error:
        if _NO_CUDA not in str(error):
            raise
        _check_one_device(func, tensors)
        return repeat(True)
    return [leaf.device == GPU for leaf in _leaves(found) if isinstance(leaf, Tensor)]


_NO_CUDA = "not linked with support for cuda"
"""Fake tensors that compute an operator by others cannot index or copy without CUDA."""
_JOIN = {"aten::cat", "aten::stack"}
_INDEX = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_MOVE = {"aten::copy_", "aten::set_"}


def _check_what_fakes_allow(func: Any, args: Any, kwargs: Any) -> None:
    """Raise RuntimeError for mixtures that a GPU refuses and fake tensors allow.

    Fake tensors allow a single number on the CPU beside tensors of a GPU, in all operators. A GPU
    refuses it where tensors are joined, and where the number is changed. It also refuses to index
    a tensor of the CPU, and random numbers of the CPU.
    """
    leaves = [*_leaves(args), *_leaves(kwargs)]
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    schema = func._schema
    if schema.name in _JOIN:
        _check_one_device(func, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
    if schema.name in _INDEX and not isinstance(args[0], GpuTensor):
        raise RuntimeError(f"{func} indexes a tensor of the CPU by one of the GPU")
    named = {argument.name: argument for argument in schema.arguments}
    given = [
        *zip(schema.arguments, args, strict=False),
        *((named[n], v) for n, v in kwargs.items()),
    ]
    for argument, value in given:
        if argument.alias_info is None or not argument.alias_info.is_write or schema.name in _MOVE:
            continue
        if any(isinstance(t, Tensor) and not isinstance(t, GpuTensor) for t in _leaves(value)):
            raise RuntimeError(f"{func} writes to the CPU what comes from the GPU")


def _check_one_device(func: Any, tensors: list[Tensor]) -> None:
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise RuntimeError(f"{func} on tensors of several devices: {', '.join(sorted(devices))}")


def _fake(tensor: Tensor, mode: FakeTensorMode) -> FakeTensor:
    """Return a fake tensor with the tensor's shape, strides, type and device."""
    with torch._C._DisableTorchDispatch():
        shape = torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta"
        )
    return FakeTensor(mode, shape, GPU if isinstance(tensor, GpuTensor) else CPU)


def _facts(leaf: Any) -> Any:
    """Return what the check of a call depends on."""
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.shape, leaf.stride(), isinstance(leaf, GpuTensor)
    return type(leaf), repr(leaf)


def _stand_in(value: Any) -> Any:
    is_name = isinstance(value, str) and value in {"cuda", "cuda:0"}
    is_gpu = isinstance(value, torch.device) and value.type == "cuda"
    return _STAND_IN if is_name or is_gpu else value


def _plain(value: Any) -> Any:
    if isinstance(value, GpuTensor):
        return value.numbers
    return CPU if _is_stand_in(value) else value


def _is_stand_in(value: Any) -> bool:
    return isinstance(value, torch.device) and value == _STAND_IN


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Return nested arguments with a function applied to each leaf; faster than PyTorch's own."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind(_mapped(function, inside) for inside in value)
    if kind is dict:
        return {key: _mapped(function, inside) for key, inside in value.items()}
    return function(value)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the leaves of nested arguments."""
    if type(value) in {tuple, list}:
        for inside in value:
            yield from _leaves(inside)
    elif type(value) is dict:
        yield from _leaves(list(value.values()))
    else:
        yield value
