"""Explicit randomness: one seed for a run, one independent stream for each purpose."""

import hashlib

import torch

from gdfq.errors import UsageError


def stream(seed: int, purpose: str) -> torch.Generator:
    """Return a CPU random generator that depends only on `seed` and `purpose`.

    Streams of different purposes are independent. Drawing more calibration labels, for example,
    does not change how the generator's weights are initialised.

    Args:
        seed: Seed of the run.
        purpose: Name of the use, such as "spectral.draw". It is hashed into the numbers: never
            rename one.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def check_seed(seed: int) -> int:
    """Return the seed.

    Raises:
        UsageError: It is not a whole number of at least 0.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UsageError(f"a seed must be a whole number, at least 0; got {seed!r}.")
    return seed
