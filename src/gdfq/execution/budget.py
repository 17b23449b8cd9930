"""The memory budget of a run: how many images pass a network at once."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gdfq.errors import UsageError

if TYPE_CHECKING:  # the command line parses sizes without torch
    import torch

_CPU_BYTES = 5 * 2**28
"""1.25 GiB: a run on images of 224x224 then takes about 3 GiB in all (benchmarks/memory.py).
The rest is for the process itself, the networks, and the images that are held."""
_GPU_SHARE = 0.5
"""Of a GPU's free memory: the rest is for weights, gradients, optimizer and work space."""

_UNITS: Mapping[str, int] = {
    unit: base**power
    for base, units in ((1000, ("B", "KB", "MB", "GB")), (1024, ("", "KIB", "MIB", "GIB")))
    for power, unit in enumerate(units)
}


def parse_bytes(text: str) -> int | None:
    """Return the bytes of a size such as "300KB" or "1.5GiB"; None for text that is no size."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]+)?)\s*([KMG]?I?B|)", text.strip().upper())
    size = 0 if match is None else int(float(match[1]) * _UNITS.get(match[2], 0))
    return size if size >= 1 else None


def bytes_of(given: str | int | None, must: str) -> int | None:
    """Return the bytes that a user means; None is none.

    Args:
        given: A size such as "300KB", or bytes.
        must: What the error says that must hold.

    Raises:
        UsageError: The text is no size, or it is no positive whole number.
    """
    found = parse_bytes(given) if isinstance(given, str) else given
    if given is not None and (not isinstance(found, int) or isinstance(found, bool) or found < 1):
        raise UsageError(f"{must}; got {given!r}.")
    return found


@dataclass(frozen=True)
class MemoryBudget:
    """What the activations of the images that pass a network together may take.

    Every stage that passes images asks it how many of them fit. It decides what is computed
    together and what is computed twice, so results depend on it by rounding; a budget far below the
    default makes the parts smaller that a batch is tuned in, and the student another one.

    Attributes:
        bytes: Bytes of activations; None for the default of the device: 1.25 GiB on a CPU, half of
            the free memory of a GPU.
    """

    bytes: int | None = None

    @classmethod
    def of(cls, memory: "str | int | MemoryBudget | None") -> "MemoryBudget":
        """Return the budget that a user means: a size such as "2GiB", bytes, or None.

        Raises:
            UsageError: The text is no size, or it is not positive.
        """
        if isinstance(memory, MemoryBudget):
            return memory
        must = "memory must be a positive number of bytes, or a size such as 512MiB or 2GiB"
        return cls(bytes_of(memory, must))

    def room(self, device: "torch.device") -> int:
        """Return the bytes of activations that a device has room for."""
        if self.bytes is not None:
            return self.bytes
        if device.type == "cuda":
            import torch

            free, _ = torch.cuda.mem_get_info(device)
            return int(_GPU_SHARE * free)
        return _CPU_BYTES

    def images(self, bytes_per_image: int, device: "torch.device") -> int:
        """Return how many images fit at once; at least one.

        Args:
            bytes_per_image: See `gdfq.graph.memory.forward_bytes` and `training_bytes`.
            device: Where they pass the network.
        """
        return max(1, self.room(device) // max(1, bytes_per_image))
