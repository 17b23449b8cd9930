"""What ONNX Runtime really runs: the kernels of its own profile."""

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def kernels(data: bytes, images: np.ndarray[Any, Any]) -> Counter[str]:
    """Return how often each type of operator runs, by the runtime's profile of one call.

    Args:
        data: An ONNX file with one input.
        images: The input [N, *shape].
    """
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
        session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
        session.run(None, {session.get_inputs()[0].name: images})
        events = json.loads(Path(session.end_profiling()).read_text())
    return Counter(
        event["args"]["op_name"]
        for event in events
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time")
    )


INTEGER_CONVOLUTIONS = frozenset({"QLinearConv", "ConvInteger"})


def float_convolutions(found: Counter[str]) -> int:
    """Return how many convolutions are computed in float, fused with an activation or not."""
    return sum(
        count
        for kind, count in found.items()
        if "Conv" in kind and kind not in INTEGER_CONVOLUTIONS
    )
