"""A frozen network as a `torch.export` program (.pt2), which runs without gdfq."""

import io

import torch
from torch import fx

from gdfq.errors import UsageError, first_line
from gdfq.execution.tracing import quiet_tracing
from gdfq.graph.tensors import flat_module, tensors_of


def to_program(network: fx.GraphModule, input_shape: tuple[int, ...]) -> bytes:
    """A frozen network [N, *input_shape] -> outputs, any N, as the contents of a .pt2 file.

    It consists of PyTorch's own operators alone; weights are stored as one byte a code. Raises
    UsageError when the network cannot be exported for any batch size.
    """
    example = torch.zeros(2, *input_shape)  # a batch of one would be taken for a constant
    # A plain module: export would keep a GraphModule's calls of gdfq's functions by name.
    module = flat_module(network.graph, tensors_of(network)).eval()
    buffer = io.BytesIO()
    try:
        with quiet_tracing(), torch.no_grad():
            shapes = ({0: torch.export.Dim.DYNAMIC},)
            program = torch.export.export(module, (example,), dynamic_shapes=shapes)
            torch.export.save(program, buffer)
    except Exception as error:
        raise UsageError(
            "the network must be traceable by torch.export; tracing failed with: "
            f"{first_line(error)}. Export with --format safetensors instead."
        ) from error
    return buffer.getvalue()
