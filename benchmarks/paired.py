"""Predictions of two networks on the same test images, compared image by image."""

import base64
import zlib

import numpy as np
import torch
from torch import Tensor


def interval(gain: Tensor) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of `gain`, one number an image, in percent."""
    draw = torch.Generator().manual_seed(0)
    picks = torch.randint(len(gain), (1000, len(gain)), generator=draw)
    means = gain.double()[picks].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975]).double()).tolist()
    return 100 * low, 100 * high


def packed(right: Tensor) -> str:
    """Which images were answered rightly, as text that fits into a JSON file."""
    return base64.b85encode(zlib.compress(np.packbits(right.numpy()).tobytes(), 9)).decode()


def unpacked(text: str, images: int) -> Tensor:
    """What `packed` was given: booleans, one an image."""
    bits = np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8)
    return torch.from_numpy(np.unpackbits(bits, count=images).astype(bool))
