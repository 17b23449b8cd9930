"""Tensors in fewer bytes, without loss.

The bytes of equal significance of all elements form a plane. Planes of signs and exponents repeat
themselves, as do all planes where values are clipped; those of mantissas hardly do. Each plane is
therefore compressed only if a sample of it becomes smaller.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

_MIN_BYTES = 2**14
"""Smaller tensors are not packed."""
_LEVEL = 1
"""Of zlib: higher levels take several times longer and save hardly more."""
_SAMPLES, _SAMPLE_BYTES = 8, 2**12
_MAX_SHARE = 0.95
"""Largest share of its bytes that a compressed plane may take."""
_MAX_RATIO = 64
"""Elements per byte of a compressed plane: a file explains the memory that it unpacks to."""


def packed(values: Tensor) -> tuple[Tensor, list[int]] | None:
    """Return a tensor in fewer bytes.

    Args:
        values: [n], dense, on the CPU.

    Returns:
        Bytes [m] of all planes one after the other, and how many each plane has; n bytes are a
        plane as it is. None if the tensor would not become smaller.
    """
    if values.nbytes < _MIN_BYTES or values.element_size() == 1:
        return None
    planes = [plane.contiguous() for plane in values.view(torch.uint8).view(len(values), -1).T]
    shorter = [_compressed(plane) for plane in planes]
    if all(plane is None for plane in shorter):
        return None
    stored = [old if new is None else new for old, new in zip(planes, shorter, strict=True)]
    return torch.cat(stored), [len(plane) for plane in stored]


def unpacked(data: Tensor, sizes: Sequence[int], count: int, dtype: torch.dtype) -> Tensor:
    """Return the tensor [count] that `packed` made smaller.

    Raises:
        ValueError: The bytes are not those of such a tensor.
    """
    if len(sizes) != dtype.itemsize or sum(sizes) != len(data) or min(sizes) < 0:
        raise ValueError(f"planes of {sizes} bytes do not make {count} numbers of {dtype}")
    planes = [
        part if len(part) == count else _decompressed(part, count)
        for part in data.split(list(sizes))
    ]
    return torch.stack(planes, 1).view(-1).view(dtype)


def _compressed(plane: Tensor) -> Tensor | None:
    """Return a plane compressed, or None if that does not make it smaller."""
    stride = max(1, len(plane) // _SAMPLES)
    sample = b"".join(
        _bytes(plane[start : start + _SAMPLE_BYTES]) for start in range(0, len(plane), stride)
    )
    if len(zlib.compress(sample, _LEVEL)) > _MAX_SHARE * len(sample):
        return None
    data = zlib.compress(_bytes(plane), _LEVEL).ljust(-(-len(plane) // _MAX_RATIO), b"\0")
    return _tensor(data) if len(data) < len(plane) else None


def _decompressed(data: Tensor, count: int) -> Tensor:
    if count > _MAX_RATIO * len(data):
        raise ValueError(f"{len(data)} bytes do not explain {count} numbers")
    reader = zlib.decompressobj()
    try:  # what follows the compressed bytes is ignored
        plane = reader.decompress(_bytes(data), count + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(plane) != count or not reader.eof:
        raise ValueError(f"a plane of {count} bytes unpacks to {len(plane)}")
    return _tensor(plane)


def _bytes(plane: Tensor) -> bytes:
    data: bytes = plane.numpy().tobytes()
    return data


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
