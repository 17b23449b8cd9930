"""The full-precision file beside the quantized one."""

import pytest
from support import networks

from gdfq.deploy.benchmark import side_by_side
from gdfq.deploy.onnx.writer import to_onnx
from gdfq.quantized import QuantizedNetwork


def test_full_precision_file_has_the_function_without_rounding(small: QuantizedNetwork) -> None:
    network = small.network.as_float()
    names = [str(node.target) for node in network.graph.nodes]
    assert not any("quantize" in name and "float" not in name for name in names)
    (a, b), *_ = side_by_side(
        [to_onnx(n, small.card.inputs, {}) for n in (network, small.network)],
        networks.SHAPE, seconds=0.01, batches=(1,), threads=(1,),
    )  # fmt: skip
    assert a.low <= a.median <= a.high
    assert (b.batch, b.threads) == (1, 1)
    assert b.images_per_second == pytest.approx(1000 / b.median)
