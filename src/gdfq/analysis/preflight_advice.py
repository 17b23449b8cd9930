"""What to expect of a run at its bits, from measured runs, with advice."""

from collections.abc import Iterator, Sequence

from gdfq.functional.grid import Bits

MAX_NARROW_CHANNELS = 16
"""Depthwise layers of so few channels lose the most accuracy and are slow in integer kernels."""


def preflight_advice(bits: Bits, narrow: Sequence[str]) -> Iterator[str]:
    """Yield what to expect at these bits; `narrow` are the names of narrow depthwise layers."""
    smallest = min(bits.weights, bits.activations)
    if narrow and smallest < 8:
        yield (
            f"depthwise layers of {MAX_NARROW_CHANNELS} channels or fewer lose most and gain no "
            f"speed: {', '.join(narrow)}. Give them more bits: --layer-bits NAME=8 or NAME=float."
        )
    if smallest == 2:
        yield "2 bits lost 14 points on a CIFAR-10 ResNet-20: the network will be of little use."
    elif smallest == 3:
        yield "3 bits lost 3 points on a CIFAR-10 ResNet-20 and 8 on a CIFAR-100 ResNet-56."
    elif smallest == 4:
        yield (
            "4 bits lost 1 point on a CIFAR-10 ResNet-20, 3 on a CIFAR-100 ResNet-56 and 11 on "
            "MobileNetV1 x0.25; activations of 8 bits (w4a8) do not make the file larger."
        )
