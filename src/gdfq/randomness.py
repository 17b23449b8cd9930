"""Explicit randomness: one seed for a run, one independent stream for each purpose."""

import hashlib

import torch


def stream(seed: int, purpose: str) -> torch.Generator:
    """A CPU random stream that depends on `seed` and `purpose` only.

    Separate purposes get unrelated streams, so that (say) drawing more calibration labels
    never changes how the generator's weights are initialised.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
