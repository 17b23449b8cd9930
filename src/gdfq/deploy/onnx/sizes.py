"""How much of an ONNX file each weight takes, at each number of bits."""

import ml_dtypes
import numpy as np
import onnx_ir as ir

from gdfq.student.integer_network import IntegerNetwork

PACKED = {
    2: (ir.DataType.INT2, ml_dtypes.int2),
    3: (ir.DataType.INT4, ml_dtypes.int4),
    4: (ir.DataType.INT4, ml_dtypes.int4),
}
"""Types of weights' codes on disk, by bits; the others are INT8."""
WEIGHT_BITS = (2, 4, 8)
"""The widths that fill their type: any other takes as much of a file as the next one of these."""


def weight_sizes(network: IntegerNetwork, data: bytes) -> list[dict[int, int]]:
    """Bytes of the file that each weight takes at each of WEIGHT_BITS, for weights of 4 bits.

    network: the frozen network that `to_onnx` made `data` of; weights in its order. Codes, scales,
    zero points and the nodes that dequantize them count. At 8 bits codes are as they multiply:
    without zero point, and nothing is cast.
    """
    import onnx

    graph = onnx.load_from_string(data).graph
    parts = {value.name: _entry(value.ByteSize()) for value in graph.initializer}
    parts |= {node.output[0]: _entry(node.ByteSize()) for node in graph.node}
    sizes = []
    for weight in network.weights:
        base = f"{weight.name}.weight"
        count = weight.codes.numel()
        narrow = sum(parts.get(base + part, 0) for part in (".cast", "_zero", ".sub"))
        always = sum(parts.get(base + part, 0) for part in ("", "_scale", "_zeros", ".dq", ".mul"))
        always -= -(-count // 2)
        # A grouped transposed convolution's nodes are named after its weight at 8 bits alone.
        wide = 2 * (len(base) + 4) if f"{base}.mul" in parts else 0
        if not wide and f"{base}_zeros" not in parts:  # which wide weights have, others need not
            channels = weight.scale.numel()
            zeros = onnx.numpy_helper.from_array(np.zeros(channels, np.int8), f"{base}_zeros")
            wide = _entry(zeros.ByteSize()) + 3 + len(zeros.name)
        sizes.append(
            {
                bits: always + -(-count * bits // 8) + (narrow if bits in PACKED else wide)
                for bits in WEIGHT_BITS
            }
        )
    return sizes


def _entry(size: int) -> int:
    """Bytes of a message of `size` bytes in a list of a file: its kind, its length and itself."""
    return 1 + max(1, -(-size.bit_length() // 7)) + size
