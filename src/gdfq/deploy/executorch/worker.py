"""A process that lowers programs to `.pte` files and runs these, in ExecuTorch.

    python -m gdfq.deploy.executorch.worker

It answers JSON objects (`gdfq.deploy.line_process`); tensors pass through files:

    {"lower": "program.pt2", "to": "student.pte"}       {}
    {"run": "student.pte", "on": "inputs.safetensors",
     "to": "outputs.safetensors"}                       {}

Tensors are named by their position: "0", "1". ExecuTorch cannot share a process with ONNX Runtime.
"""

from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators of programs
from safetensors.torch import load_file, save_file

from gdfq.deploy.executorch.calls import loaded_method
from gdfq.deploy.line_process import answer_lines
from gdfq.errors import UsageError, first_line


def _answer(asked: dict[str, Any]) -> dict[str, object]:
    if "lower" in asked:
        _lower(Path(asked["lower"]), Path(asked["to"]))
    else:
        _run(Path(asked["run"]), Path(asked["on"]), Path(asked["to"]))
    return {}


def _lower(program: Path, file: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    try:
        lowered = to_edge_transform_and_lower(
            torch.export.load(program),
            partitioner=[XnnpackPartitioner()],
            # Operators of pairs of quantize and dequantize are not of the edge dialect.
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        file.write_bytes(lowered.to_executorch().buffer)
    except Exception as error:
        raise _refusal(error) from error


def _run(file: Path, given: Path, found: Path) -> None:
    inputs = load_file(given)
    try:
        outputs = loaded_method(file).execute([inputs[str(index)] for index in range(len(inputs))])
    except RuntimeError as error:
        raise _refusal(error) from error
    save_file({str(i): output.contiguous() for i, output in enumerate(outputs)}, found)


def _refusal(error: Exception) -> UsageError:
    return UsageError(
        "ExecuTorch must be able to express and run each operator of the network; it says: "
        f"{first_line(error)}. Choose another target: gdfq targets."
    )


if __name__ == "__main__":
    answer_lines(_answer)
