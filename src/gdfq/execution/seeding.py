"""Explicit randomness: one seed for a run, one independent stream for each purpose."""

import hashlib

import torch

from gdfq.errors import UsageError


def stream(seed: int, purpose: str) -> torch.Generator:
    """A CPU random stream that depends on `seed` and `purpose` only.

    Separate purposes get unrelated streams, so that (say) drawing more calibration labels
    never changes how the generator's weights are initialised.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def check_seed(seed: int) -> int:
    """Return the seed. Raises UsageError for anything that is none."""
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UsageError(f"a seed must be a whole number, at least 0; got {seed!r}.")
    return seed
