"""The processes of a run, each on its own device.

All processes run the same program with the same random streams. Where a value of the whole batch is
needed, they compute a mean over the processes, whose gradient is again a mean:

    y = 1/P Σ_p x_p,   ∂x_p = 1/P Σ_q ∂y_q

Each process may therefore differentiate a loss of the whole batch (computed with such means) or of
its own shard. The mean of the results is the gradient of the loss of the whole batch.

The engine is torch.distributed, started by torchrun. Wrappers of modules (DistributedDataParallel,
with or without accelerate or Lightning Fabric) average gradients after the backward pass. They
cannot compute statistics of the whole batch *within* it, which these methods need.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gdfq.errors import GdfqError, UsageError, first_line

Statistics = Sequence[tuple[Tensor, Tensor]]
"""Mean and biased variance of each batch norm's input, each of shape [channels of that layer]."""


class Group:
    """The processes that work together. This class is a single process."""

    rank, size = 0, 1

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of x over all processes, with gradient.

        Args:
            x: A tensor of the same shape in every process.
        """
        return x

    def average_(self, tensors: Iterable[Tensor | None]) -> None:
        """Replace each tensor by its mean over all processes. None is skipped."""

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate x [n, ...] of all processes to [size n, ...]. No gradient."""
        return x

    def broadcast(self, rank: int, x: Tensor) -> Tensor:  # noqa: ARG002
        """Return the x of one process. All x have the same shape. No gradient."""
        return x

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by that of the first process."""

    def wait(self) -> None:
        """Wait until all processes have arrived here."""

    def divides(self, count: int) -> bool:
        """Return whether `count` images divide evenly. If not, every process takes all of them."""
        return count % self.size == 0

    def shard(self, x: Tensor) -> Tensor:
        """Return this process's shard of x [N, ...]: its rows."""
        if self.size == 1 or not self.divides(len(x)):
            return x
        return x.tensor_split(self.size)[self.rank]

    def moments(self, statistics: Statistics) -> Statistics:
        """Return the statistics of the whole batch, with gradients.

        Args:
            statistics: Those of this process's shard.
        """
        return statistics

    def batch_norm(
        self, x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
    ) -> Tensor:
        """Apply batch norm with the statistics of the whole batch.

        Args:
            x: This process's shard, [n, C, *].
            scale: [C], or None for 1.
            shift: [C], or None for 0.
            eps: Added to the variance.
        """
        return F.batch_norm(x, None, None, scale, shift, training=True, eps=eps)

    def check_batch(self, batch: int, what: str) -> None:
        """Check that the processes can divide a batch evenly.

        Args:
            batch: Images of the batch.
            what: What has the batch, for the message.

        Raises:
            UsageError: They cannot; the message says which numbers of processes can.
        """
        if not self.divides(batch):
            fitting = [str(n) for n in range(1, batch + 1) if batch % n == 0]
            raise UsageError(
                f"{what} has {batch} images per batch, which {self.size} processes cannot divide "
                f"evenly. Start one of {', '.join(fitting)} processes."
            )


ALONE = Group()


class Processes(Group):
    """The processes of torch.distributed's default group."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def mean(self, x: Tensor) -> Tensor:
        found: Tensor = _Mean.apply(x, self.size)
        return found

    @torch.no_grad()
    def average_(self, tensors: Iterable[Tensor | None]) -> None:
        present = [tensor for tensor in tensors if tensor is not None]
        if not present:
            return
        flat = _mean_(torch.cat([tensor.reshape(-1) for tensor in present]), self.size)
        for tensor, value in zip(present, flat.split([t.numel() for t in present]), strict=True):
            tensor.copy_(value.view_as(tensor))

    @torch.no_grad()
    def gather(self, x: Tensor) -> Tensor:
        parts = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)
        ]
        _together(dist.all_gather, parts, x.contiguous())
        return _like(torch.cat(parts), x)

    @torch.no_grad()
    def broadcast(self, rank: int, x: Tensor) -> Tensor:
        shared = x.clone(memory_format=torch.contiguous_format)
        _together(dist.broadcast, shared, rank)
        return _like(shared, x)

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            tensor.copy_(self.broadcast(0, tensor))

    def wait(self) -> None:
        _together(dist.barrier)

    def moments(self, statistics: Statistics) -> Statistics:
        means = torch.cat([mean for mean, _ in statistics])
        variances = torch.cat([variance for _, variance in statistics])
        mean = self.mean(means)
        variance = self.mean(variances + (means - mean).square())
        sizes = [len(m) for m, _ in statistics]
        return list(zip(mean.split(sizes), variance.split(sizes), strict=True))

    def batch_norm(
        self, x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
    ) -> Tensor:
        dims = [0, *range(2, x.ndim)]
        variance, mean = torch.var_mean(x, dims, correction=0)
        ((mean, variance),) = self.moments([(mean, variance)])
        shape = [-1] + [1] * (x.ndim - 2)
        factor = (variance + eps).rsqrt()
        factor = factor if scale is None else factor * scale
        centred = (x - mean.view(shape)) * factor.view(shape)
        return centred if shift is None else centred + shift.view(shape)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return _mean_(x.clone(memory_format=torch.contiguous_format), size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        return _mean_(grad, ctx.size), None


def _mean_(x: Tensor, size: int) -> Tensor:
    _together(dist.all_reduce, x)
    return x.div_(size)


def _together(operation: Callable[..., Any], *arguments: Any) -> None:
    """Call a collective operation.

    Raises:
        GdfqError: A process has ended.
    """
    try:
        operation(*arguments)
    except RuntimeError as error:
        raise GdfqError(
            "all processes of a run must live until its end; one has ended "
            f"({first_line(error)}). See its last messages; the same command resumes from the "
            "checkpoint."
        ) from error


def _like(x: Tensor, other: Tensor) -> Tensor:
    """Return x in the memory format of another tensor."""
    last = other.ndim == 4 and other.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """Join the processes that torchrun started; without torchrun, the group is this process alone.

    On GPUs, each process uses the GPU whose index is its local rank.

    Args:
        device: Decides the backend: NCCL for GPUs, otherwise Gloo.

    Yields:
        The group.

    Raises:
        UsageError: The machine has fewer GPUs than processes.
    """
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield ALONE
        return
    if device.type == "cuda":
        here, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if here >= gpus:
            raise UsageError(
                f"each process needs a GPU of its own; this machine has {gpus} and this is process "
                f"{here + 1}. Start as many, or use --device cpu."
            )
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes()
    finally:
        dist.destroy_process_group()
