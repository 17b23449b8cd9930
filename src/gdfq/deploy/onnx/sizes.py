"""The bytes of an ONNX file that each weight takes, at each number of bits."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from gdfq.functional.float_grid import E4M3, E5M2, NumberFormat, formats_of
from gdfq.student.integer_network import IntegerNetwork

PACKED = {
    2: (ir.DataType.INT2, ml_dtypes.int2),
    3: (ir.DataType.INT4, ml_dtypes.int4),
    4: (ir.DataType.INT4, ml_dtypes.int4),
}
"""Types of weights' codes on disk, by bits; the others are INT8."""
STORED_FLOATS: Mapping[NumberFormat, Any] = {
    E4M3: ml_dtypes.float8_e4m3fn,
    E5M2: ml_dtypes.float8_e5m2,
    **dict.fromkeys(formats_of(4, signed=True), ml_dtypes.float8_e4m3fn),
}
"""What holds the numbers of a format. E4M3 has all numbers of the signed formats of 4 bits; ONNX
Runtime has no kernel for the floats of 4 bits that ONNX defines."""
WEIGHT_BITS = (2, 4, 8)
"""Bits that fill their type on disk: other bits take as many bytes as the next larger of these."""


def weight_sizes(network: IntegerNetwork, data: bytes) -> list[dict[int, int]]:
    """Return the bytes of a file that each weight would take at each of WEIGHT_BITS.

    These are the bytes of codes, scales, zero points and the nodes that dequantize them. Weights of
    8 bits have no zero point and need no cast.

    Args:
        network: The integer network, with weights of 4 bits.
        data: What `to_onnx` returned for it.

    Returns:
        For each weight, in the order of the network, the bytes by number of bits.
    """
    import onnx

    graph = onnx.load_from_string(data).graph
    parts = {value.name: _entry(value.ByteSize()) for value in graph.initializer}
    parts |= {node.output[0]: _entry(node.ByteSize()) for node in graph.node}
    sizes = []
    for weight in network.weights:
        base = f"{weight.name}.weight"
        count = weight.codes.numel()
        packed_extra = sum(parts.get(base + part, 0) for part in (".cast", "_zero", ".sub"))
        common = sum(parts.get(base + part, 0) for part in ("", "_scale", "_zeros", ".dq", ".mul"))
        common -= -(-count // 2)
        # A grouped transposed convolution's nodes are named after its weight at 8 bits alone.
        int8_extra = 2 * (len(base) + 4) if f"{base}.mul" in parts else 0
        if (
            not int8_extra and f"{base}_zeros" not in parts
        ):  # which 8-bit weights have, others may lack
            channels = weight.scale.numel()
            zeros = onnx.numpy_helper.from_array(np.zeros(channels, np.int8), f"{base}_zeros")
            int8_extra = _entry(zeros.ByteSize()) + 3 + len(zeros.name)
        sizes.append(
            {
                bits: common
                + -(-count * bits // 8)
                + (packed_extra if bits in PACKED else int8_extra)
                for bits in WEIGHT_BITS
            }
        )
    return sizes


def _entry(size: int) -> int:
    """Return the bytes of a protobuf list entry of `size` bytes, with its tag and length."""
    return 1 + max(1, -(-size.bit_length() // 7)) + size
