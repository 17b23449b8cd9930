"""An integer network as a `torch.export` program (.pt2), which runs without gdfq."""

import io
from collections.abc import Sequence

import torch

from gdfq.errors import UsageError, first_line
from gdfq.execution.tracing import exclusive_tracing
from gdfq.graph.inputs import InputSpec
from gdfq.graph.tensors import flat_module
from gdfq.student.integer_network import IntegerNetwork


def to_program(network: IntegerNetwork, inputs: Sequence[InputSpec]) -> bytes:
    """Return the contents of a .pt2 file, which takes batches of any length.

    It only has PyTorch's own operators; weights are stored as one byte per code.

    Raises:
        UsageError: The network cannot be exported for any batch size.
    """
    examples = tuple(spec.zeros(2) for spec in inputs)  # a batch of one would become a constant
    # A plain module: export would keep a GraphModule's calls of gdfq's functions by name.
    module = flat_module(network.integer_form.graph, network.tensors).eval()
    buffer = io.BytesIO()
    try:
        with exclusive_tracing(), torch.no_grad():
            shapes = ({0: torch.export.Dim.DYNAMIC},) * len(examples)
            program = torch.export.export(module, examples, dynamic_shapes=shapes)
            torch.export.save(program, buffer)
    except Exception as error:
        raise UsageError(
            "the network must be traceable by torch.export; tracing failed with: "
            f"{first_line(error)}. Export with --target safetensors instead."
        ) from error
    return buffer.getvalue()
