"""Variants of the ONNX file, which targets choose."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """How an integer network is written as ONNX.

    Attributes:
        folds_weights: Whether weights are INT8 codes minus zero point, instead of packed INT4 or
            INT2 codes with the operators that a runtime folds when it loads the file.
        lowest_opset: Whether operators are written in the lowest opset from 13 on that has them.
        has_barriers: Whether operators that change no number separate what OpenVINO fuses wrongly
            (`gdfq.deploy.onnx.barriers`).
        has_int2: Whether weights of 2 bits are INT2; they are INT4 otherwise.
        only_pairs: Whether every QuantizeLinear is read by its DequantizeLinear alone, so that all
            other operators compute with floats, and what moves values is quantized again. Clamps
            stay where they are. Activations must have 8 bits, and each weight one axis of channels.
        signed: Whether codes of activations are INT8 with zero points of 0, and biases are float.
    """

    folds_weights: bool = False
    lowest_opset: bool = False
    has_barriers: bool = False
    has_int2: bool = True
    only_pairs: bool = False
    signed: bool = False


PACKED_WEIGHTS = Form()
"""The smallest file."""
COMPATIBLE = Form(folds_weights=True, lowest_opset=True)
"""The file that most runtimes read."""
OPENVINO = Form(has_barriers=True, has_int2=False)
"""The file for OpenVINO."""
TENSORRT = Form(folds_weights=True, lowest_opset=True, only_pairs=True, signed=True)
"""The file for TensorRT."""
QNN = Form(folds_weights=True, only_pairs=True)
"""The file for Qualcomm's QNN."""
