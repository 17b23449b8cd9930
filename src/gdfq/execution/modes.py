"""The modes of PyTorch that a caller may be in, and that a call does not inherit."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from gdfq.errors import UsageError


@contextmanager
def without_modes_of_caller() -> Iterator[None]:
    """Within this context none of a caller's modes counts; it is also a decorator.

    In inference mode nothing can be learned, autocast rounds what must stay float32, and with a
    default device half of the tensors would lie elsewhere. Each belongs to the thread alone. The
    default dtype belongs to the process, where other threads rely on it, and is left as it is.

    Raises:
        UsageError: The default dtype is another than float32.
    """
    default = torch.get_default_dtype()
    if default != torch.float32:
        raise UsageError(
            f"gdfq computes in float32, and the default dtype must be that; it is {default}. Call "
            "torch.set_default_dtype(torch.float32) first; the network may have any dtype."
        )
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(mode=False))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
