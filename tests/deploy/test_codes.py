"""How ONNX files store codes, and that a tensor which is rounded again has the codes of its values."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import networks
from support.small_runs import quantized_by_fast

from gdfq.deploy.onnx.codes import StoredCodes, has_ties, stored_codes
from gdfq.deploy.onnx.session import onnx_session
from gdfq.deploy.onnx.writer import to_onnx
from gdfq.deploy.runtimes import onnx_values
from gdfq.quantized import QuantizedNetwork
from gdfq.student.integer_network import ActivationGrid, IntegerNetwork

CARRIED, NARROW = "relu", "relu_into_layers"
"""A ReLU's output with 8 bits, and as it enters a layer with 4."""
AT_THE_TOP = StoredCodes(f"{NARROW}.q", 240, needs_clip=False, adds_zero=True)
AS_THEY_ARE = StoredCodes(f"{NARROW}.q", 0, needs_clip=False, adds_zero=True)
CLIPPED = StoredCodes(f"{NARROW}.clip", 0, needs_clip=True, adds_zero=True)
WITH_TIES = StoredCodes(f"{NARROW}.clip", 0, needs_clip=True, adds_zero=False)


def grid_of(network: IntegerNetwork, name: str) -> ActivationGrid:
    return next(grid for grid in network.activations if grid.name == name)


def with_grids(
    small: QuantizedNetwork, carried: tuple[float, int], narrow: tuple[float, int]
) -> IntegerNetwork:
    """A copy whose two grids have these scales and zero points of signed codes."""
    network = copy.deepcopy(small.network)
    for name, (scale, zero_point) in ((CARRIED, carried), (NARROW, narrow)):
        grid = grid_of(network, name)
        grid.scale.fill_(scale)
        grid.zero_point.fill_(zero_point)
    return network


GRIDS = [
    # 8 bits of step 0.103 from 0 reach 26.3; 4 bits of step 1 from 0 reach 15.
    ((0.103, -128), (1.0, -8), AT_THE_TOP),
    # 15.49 rounds to 15, and 15.51 to 16.
    ((15.49 / 255, -128), (1.0, -8), AS_THEY_ARE),
    ((15.51 / 255, -128), (1.0, -8), AT_THE_TOP),
    # From −13.2 to 13.1 around 0: 4 bits of step 1 from −8 are exceeded on both sides,
    ((0.103, 0), (1.0, 0), CLIPPED),
    # of step 2 (−16 to 14) on none, from −15 to 0 above alone, from 0 to 15 below alone.
    ((0.103, 0), (2.0, 0), AS_THEY_ARE),
    ((0.103, 0), (1.0, 7), AT_THE_TOP),
    ((0.103, 0), (1.0, -8), CLIPPED),
    # Each tenth code lies between two codes; 0.09999 · 5 is 0.00005 off, and 0.0999 · 5 0.0005.
    ((0.1, -128), (1.0, -8), WITH_TIES),
    ((0.09999, -128), (1.0, -8), WITH_TIES),
    ((0.0999, -128), (1.0, -8), AT_THE_TOP),
]


@pytest.mark.parametrize(("carried", "narrow", "expected"), GRIDS)
def test_codes_need_a_clip_where_values_reach_below_them_or_between_two(
    carried: tuple[float, int],
    narrow: tuple[float, int],
    expected: StoredCodes,
    small: QuantizedNetwork,
) -> None:
    network = with_grids(small, carried, narrow)
    assert stored_codes(network)[NARROW] == expected


@pytest.mark.parametrize(("carried", "narrow", "expected"), GRIDS)
def test_file_holds_the_codes_that_the_values_round_to(
    carried: tuple[float, int],
    narrow: tuple[float, int],
    expected: StoredCodes,
    small: QuantizedNetwork,
) -> None:
    """Computed by hand from the codes that ONNX Runtime carries, up to the highest."""
    network = with_grids(small, carried, narrow)
    network.weights[0].scale.mul_(100)
    data = to_onnx(network, small.card.inputs, {})
    x = networks.images(16)
    found = onnx_values(data, [f"{CARRIED}.q", expected.name], [x], precise=True)
    codes = found[f"{CARRIED}.q"].astype(np.float32) - 128 - carried[1]
    steps = (codes * np.float32(carried[0])) / np.float32(narrow[0])
    rounded = np.clip(np.round(steps) + narrow[1], -8, 7)
    assert np.array_equal(found[expected.name], rounded + 8 + expected.lowest)
    assert found[f"{CARRIED}.q"].max() == 255
    assert len(np.unique(rounded)) > 5 or narrow[1] == 7  # which has no positive codes


def test_codes_of_other_activations_are_clipped(small: QuantizedNetwork) -> None:
    """What a layer or a float operator returns is not bounded."""
    stored = stored_codes(small.network)
    assert stored["x"] == StoredCodes("x.q", 0, needs_clip=False)  # 8 bits
    assert stored[CARRIED] == StoredCodes("relu.q", 0, needs_clip=False)
    assert stored["relu_1"] == StoredCodes("relu_1.clip", 0, needs_clip=True)
    assert stored[NARROW] == AT_THE_TOP


@pytest.mark.parametrize(("bits", "expected"), [("w6a4", AT_THE_TOP), ("w8a4", CLIPPED)])
def test_codes_stay_low_where_sums_would_saturate(bits: str, expected: StoredCodes) -> None:
    """2 · 255 · 127 is beyond 16 bits, 2 · 15 · 127 and 2 · 255 · 63 are not."""
    quantized = quantized_by_fast(networks.captured("Residual"), bits)
    assert stored_codes(quantized.network)[NARROW] == expected


def test_narrowed_tensors_are_rounded_by_one_integer_kernel(
    small: QuantizedNetwork, tmp_path: Path
) -> None:
    exported = small.export(tmp_path / "q.onnx")
    assert exported.differs_first == ()
    assert exported.inside.relative_error < 1e-6
    assert exported.beyond.relative_error < 1e-6
    seen = optimized(tmp_path)
    (narrowing,) = (n for n in seen if n.output[0] == f"{NARROW}.q")
    assert narrowing.op_type == "QLinearAdd"
    (carried,) = (n for n in seen if n.output[0] == narrowing.input[0])
    assert carried.op_type == "QLinearConv"
    (reader,) = (n for n in seen if f"{NARROW}.q" in n.input)
    assert reader.op_type == "QLinearConv"


def optimized(folder: Path) -> list[onnx.NodeProto]:
    """The nodes of `q.onnx` after the optimizations that are the same on all processors."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "seen.onnx")
    onnxruntime.InferenceSession(folder / "q.onnx", options, providers=["CPUExecutionProvider"])
    return list(onnx.load(folder / "seen.onnx").graph.node)


def test_ties_are_wider_where_the_kernel_adds_larger_numbers() -> None:
    """The kernel was seen to round a number 7.2e-5 off at a ratio of 12.8 to the other code."""
    steps = torch.tensor([0.5 + 7.25e-5])
    assert has_ties(steps, 17.683714 / 1.3779542)
    assert not has_ties(steps, 1.0)


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(0.02, 1) | st.floats(1, 16),
    scale=st.floats(1e-3, 10),
    carried_zero=st.integers(0, 255),
    bits=st.integers(2, 7),
    zero=st.integers(0, 127),
    at_the_top=st.booleans(),
)
def test_integer_kernel_rounds_as_the_student_where_there_are_no_ties(
    ratio: float, scale: float, carried_zero: int, bits: int, zero: int, at_the_top: bool
) -> None:
    """All 256 codes, in the sum that ONNX Runtime fuses, against the student's equation."""
    highest = 2**bits - 1
    zero = min(zero, highest)
    carried_scale, narrow_scale = np.float32(scale * ratio), np.float32(scale)
    codes = np.arange(256, dtype=np.uint8)
    steps = (codes.astype(np.float32) - carried_zero) * carried_scale / narrow_scale
    inside = (steps > -zero - 1) & (steps < highest - zero + 1)
    assume(not has_ties(torch.from_numpy(steps[inside]), float(carried_scale / narrow_scale)))
    stored_zero = zero + (255 - highest if at_the_top else 0)
    found = summed(codes, (carried_scale, carried_zero), (narrow_scale, stored_zero))
    expected = np.round(steps[inside]) + stored_zero
    assert np.array_equal(found[inside], expected.clip(0, 255))


def summed(
    codes: np.ndarray[Any, Any], carried: tuple[np.float32, int], narrow: tuple[np.float32, int]
) -> np.ndarray[Any, Any]:
    """Codes of 0 plus dequantized codes, from ONNX Runtime's QLinearAdd."""
    make = onnx.helper.make_node
    constants: dict[str, np.ndarray[Any, Any]] = {
        "carried": np.array(carried[0]),
        "carried_zero": np.array(carried[1], np.uint8),
        "narrow": np.array(narrow[0]),
        "narrow_zero": np.array(narrow[1], np.uint8),
        "zero": np.array(0, np.uint8),
        "one": np.array(1, np.float32),
        "no_shift": np.array(0, np.uint8),
    }
    graph = onnx.helper.make_graph(
        [
            make("DequantizeLinear", ["codes", "carried", "carried_zero"], ["x"]),
            make("DequantizeLinear", ["zero", "one", "no_shift"], ["0"]),
            make("Add", ["x", "0"], ["y"]),
            make("QuantizeLinear", ["y", "narrow", "narrow_zero"], ["found"]),
        ],
        "sum",
        [onnx.helper.make_tensor_value_info("codes", onnx.TensorProto.UINT8, [len(codes)])],
        [onnx.helper.make_tensor_value_info("found", onnx.TensorProto.UINT8, [len(codes)])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = [onnx.helper.make_opsetid("", 21)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    (found,) = onnx_session(model.SerializeToString()).run(None, {"codes": codes})
    return np.asarray(found)
