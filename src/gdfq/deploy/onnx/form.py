"""Variants of the ONNX file, which targets choose."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """How an integer network is written as ONNX.

    Attributes:
        folds_weights: Whether weights are INT8 codes minus zero point, instead of packed INT4 or
            INT2 codes with the operators that a runtime folds when it loads the file.
        lowest_opset: Whether operators are written in the lowest opset from 13 on that has them.
        rounds_before_sums: Whether a MaxPool of one element separates the codes of a sum's terms
            from their DequantizeLinear. It changes no code, and keeps OpenVINO from adding a
            layer's unrounded output.
        has_int2: Whether weights of 2 bits are INT2; they are INT4 otherwise.
    """

    folds_weights: bool = False
    lowest_opset: bool = False
    rounds_before_sums: bool = False
    has_int2: bool = True


PACKED_WEIGHTS = Form()
"""The smallest file."""
COMPATIBLE = Form(folds_weights=True, lowest_opset=True)
"""The file that most runtimes read."""
UNFUSED_SUMS = Form(rounds_before_sums=True, has_int2=False)
"""The file for OpenVINO."""
