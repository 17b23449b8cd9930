"""Checks of what can fail while a run computes, with errors that say what to do."""

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from gdfq.errors import GdfqError, first_line


def check_finite(losses: Mapping[str, Tensor], *, whose: str, when: str, advice: str) -> None:
    """Check that a loss is finite.

    Args:
        losses: The total loss first, then its parts; all are in the message.
        whose: What the loss belongs to, such as "student".
        when: The step, such as "step 7".
        advice: What the user can do.

    Raises:
        GdfqError: The total loss is NaN or infinite.
    """
    if not bool(next(iter(losses.values())).isfinite()):
        parts = ", ".join(f"{name} {float(value):.6g}" for name, value in losses.items())
        raise GdfqError(
            f"the {whose}'s loss must stay finite; at {when} its parts are {parts}. {advice}"
        )


def check_images_finite(losses: Mapping[str, Tensor], batch: int, iteration: int) -> None:
    """Check the losses of images that are optimised, as `check_finite` does."""
    check_finite(
        losses,
        whose="image",
        when=f"iteration {iteration} of batch {batch}",
        advice="Check that mean and std are the network's own, or use another seed.",
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out."""
    by_type = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return by_type or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


@contextmanager
def batch_that_fits_suggested(batch: int, ask: Callable[[int], object]) -> Iterator[None]:
    """Convert an out-of-memory error into a GdfqError that suggests a batch size that fits.

    Args:
        batch: Images per step.
        ask: Does with a number of images what takes most memory. Half of the largest number that
            passes is suggested, because a step holds more than one such pass.

    Raises:
        GdfqError: Memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that filled the memory
        fits = next((n for n in _halves(batch) if _has_room(ask, 2 * n)), None)
        advice = (
            f"{fits} images fit: start in another folder with --batch {fits} (batch={fits})"
            if fits
            else "not even one image fits"
        )
        raise GdfqError(
            f"a step on {batch} images must fit into memory; it does not ({first_line(error)}). "
            f"{advice}. Or lower --memory (memory=): then fewer images are computed together. "
            "Finished stages are kept, for a machine with more memory."
        ) from error


@contextmanager
def smaller_budget_suggested(stage: str, room: int) -> Iterator[None]:
    """Convert an out-of-memory error into a GdfqError that suggests a smaller budget.

    Args:
        stage: What runs, as "measuring on the test images".
        room: Bytes of the present budget for activations.

    Raises:
        GdfqError: Memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        half = f"{max(1, room // 2**21)}MiB"
        raise GdfqError(
            f"{stage} must fit into memory; it does not ({first_line(error)}). Fewer images are "
            f"computed together with a smaller budget: --memory {half} (memory='{half}')."
        ) from error


def _halves(batch: int) -> Iterator[int]:
    while batch > 1:
        batch //= 2
        yield batch


def _has_room(ask: Callable[[int], object], images: int) -> bool:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        ask(images)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            return False
        raise
    return True
