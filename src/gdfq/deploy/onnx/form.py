"""Variants of the ONNX file, which targets choose."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """How an integer network is written as ONNX.

    Attributes:
        folds_weights: Whether weights are INT8 codes minus zero point, instead of packed INT4 or
            INT2 codes with the operators that a runtime folds when it loads the file.
        lowest_opset: Whether operators are written in the lowest opset from 13 on that has them.
    """

    folds_weights: bool = False
    lowest_opset: bool = False


PACKED_WEIGHTS = Form()
"""The smallest file."""
COMPATIBLE = Form(folds_weights=True, lowest_opset=True)
"""The file that most runtimes read."""
