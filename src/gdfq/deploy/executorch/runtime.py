"""ExecuTorch, in a process of its own (`gdfq.deploy.executorch.worker`)."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from gdfq.deploy.executorch import worker
from gdfq.deploy.executorch.calls import MAX_BATCH
from gdfq.deploy.line_process import LineProcess
from gdfq.deploy.runtimes import Run
from gdfq.errors import UsageError, first_line
from gdfq.execution.tracing import exclusive_tracing
from gdfq.graph.inputs import InputSpec


def lowered(modules: Sequence[fx.GraphModule], inputs: Sequence[InputSpec]) -> list[bytes]:
    """Return graphs in PT2E form as the contents of `.pte` files, lowered for XNNPACK.

    Args:
        modules: The graphs (`gdfq.deploy.executorch.program`), of the same inputs.
        inputs: Specifications of these.

    Raises:
        UsageError: ExecuTorch cannot express an operator.
    """
    with tempfile.TemporaryDirectory() as folder, _process("write the file") as process:
        files = []
        for index, module in enumerate(modules):
            program, file = (Path(folder) / f"{index}.{end}" for end in ("pt2", "pte"))
            torch.export.save(_exported(module, inputs), program)
            process.ask(lower=str(program), to=str(file))
            files.append(file.read_bytes())
    return files


@contextmanager
def executorch_runners(*files: bytes) -> Iterator[Sequence[Run]]:
    """Return a function for each `.pte` file that runs it, in one process for all.

    The process ends with the context.
    """
    with tempfile.TemporaryDirectory() as folder, _process("run the file") as process:
        runs = []
        for index, data in enumerate(files):
            file = Path(folder) / f"{index}.pte"
            file.write_bytes(data)
            runs.append(partial(_run, process, file))
        yield runs


def _run(process: LineProcess, file: Path, *inputs: Tensor) -> list[Tensor]:
    given, found = (file.with_suffix(end) for end in (".in", ".out"))
    outputs = []
    for part in zip(*(tensor.split(MAX_BATCH) for tensor in inputs), strict=True):
        save_file({str(i): x.contiguous() for i, x in enumerate(part)}, given)
        process.ask(run=str(file), on=str(given), to=str(found))
        outputs.append(load_file(found))
    return [torch.cat([o[str(i)] for o in outputs]) for i in range(len(outputs[0]))]


def _process(task: str) -> LineProcess:
    return LineProcess(worker.__name__, f"ExecuTorch must {task}")


def _exported(module: fx.GraphModule, inputs: Sequence[InputSpec]) -> torch.export.ExportedProgram:
    # Conditions on sizes, such as those of oneDNN's convolutions, hold for the largest batch.
    examples = tuple(spec.zeros(MAX_BATCH) for spec in inputs)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    try:
        with exclusive_tracing(), torch.no_grad():
            return torch.export.export(
                module, examples, dynamic_shapes=tuple({0: batch} for _ in examples)
            )
    except Exception as error:
        raise UsageError(
            "the network must be traceable by torch.export; tracing failed with: "
            f"{first_line(error)}. Choose another target: gdfq targets."
        ) from error
