"""Tensors in fewer bytes."""

import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.narrowing import present
from torch import Tensor

from gdfq.files.packing import packed, unpacked

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16]


def clipped(count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Noise of which about a third is clipped."""
    noise = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return noise.clamp(-1, 1).to(dtype)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
def test_packed_tensor_unpacks_to_the_same_bits(dtype: torch.dtype) -> None:
    values = clipped(50_000, dtype)
    data, sizes = present(packed(values))
    assert data.nbytes < values.nbytes
    again = unpacked(data, sizes, len(values), dtype)
    assert again.dtype == dtype
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), zeros=st.integers(2000, 9000))
def test_packing_keeps_all_bits_of_any_float(seed: int, zeros: int) -> None:
    """Also NaN of any payload, infinity, −0 and denormal numbers."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (4 * 9000,), generator=draw).byte().view(torch.float32)
    values[:zeros] = 0
    data, sizes = present(packed(values))
    assert data.nbytes < values.nbytes
    again = unpacked(data, sizes, 9000, torch.float32)
    assert torch.equal(again.view(torch.int32), values.view(torch.int32))


def test_planes_are_the_bytes_of_equal_significance() -> None:
    """Ones, whose bytes from the lowest to the highest are 0, 0, 128 and 63."""
    data, sizes = present(packed(torch.ones(2**14)))
    assert struct.pack("<f", 1.0) == bytes([0, 0, 128, 63])
    for part, byte in zip(data.split(sizes), [0, 0, 128, 63], strict=True):
        assert zlib.decompressobj().decompress(part.numpy().tobytes()) == bytes([byte]) * 2**14


def test_tensor_that_cannot_become_smaller_is_not_packed() -> None:
    noise = torch.randint(0, 256, (2**17,), generator=torch.Generator().manual_seed(0))
    assert packed(noise.byte().view(torch.float32)) is None
    assert packed(torch.zeros(100)) is None  # too small to pay
    assert packed(torch.zeros(2**15, dtype=torch.uint8)) is None  # such as a random state


def test_only_compressible_planes_are_compressed() -> None:
    """Numbers in 1..2 share sign and exponent; their lower mantissa bytes are noise."""
    values = 1 + torch.rand(2**15, generator=torch.Generator().manual_seed(0))
    data, sizes = present(packed(values))
    assert sizes[0] == sizes[1] == 2**15
    assert sizes[3] < 2**15 / 50
    assert data.nbytes == sum(sizes)


def test_file_explains_the_memory_that_it_unpacks_to() -> None:
    values = torch.zeros(2**20)
    data, sizes = present(packed(values))
    assert values.nbytes <= 64 * data.nbytes
    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(2**20))), dtype=torch.uint8)
    with pytest.raises(ValueError, match="do not explain"):
        unpacked(bomb.repeat(2), [len(bomb)] * 2, 2**20, torch.int16)
    assert torch.equal(unpacked(data, sizes, 2**20, torch.float32), values)


@pytest.mark.parametrize(
    ("sizes", "count", "message"),
    [
        ([10, 10, 10], 2**14, "do not make"),
        ([1, 1], 2**14, "do not make"),
        ([-5, 517], 2**14, "do not make"),
        ([256, 256], 2**14 - 1, "unpacks to|incorrect|invalid"),
        ([256, 256], 2**14 + 1, "do not explain"),
        ([255, 257], 2**14, "do not explain|incorrect|invalid"),
    ],
)
def test_damaged_planes_are_refused(sizes: list[int], count: int, message: str) -> None:
    data, right = present(packed(torch.zeros(2**14, dtype=torch.int16)))
    assert right == [256, 256]
    with pytest.raises(ValueError, match=message):
        unpacked(data, sizes, count, torch.int16)
