"""LiteRT's interpreter, with XNNPACK, on `.tflite` files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdfq.deploy.litert.flatbuffer import with_outputs
from gdfq.deploy.litert.layout import Order, usual
from gdfq.deploy.runtimes import Run
from gdfq.errors import UsageError, first_line


class LiteInterpreter:
    """A file in LiteRT's interpreter, which resizes its inputs to the batch that it is given."""

    def __init__(self, data: bytes, threads: int = 1) -> None:
        """Load a file.

        Args:
            data: Contents of the file.
            threads: Number of threads.

        Raises:
            UsageError: The LiteRT package is not installed, or cannot load the file.
        """
        self.interpreter = _interpreter(data, threads)
        self.inputs = self.interpreter.get_input_details()
        self.outputs = self.interpreter.get_output_details()

    def __call__(self, inputs: Sequence[Tensor]) -> dict[str, np.ndarray[Any, Any]]:
        """Return the outputs by name, in the file's order of dimensions.

        Args:
            inputs: A tensor [N, *shape] for each input, in the network's order of dimensions.

        Raises:
            UsageError: The file does not run.
        """
        arrays = [_as_file(x.numpy(), usual(x.ndim)) for x in inputs]
        try:
            for detail, array in zip(self.inputs, arrays, strict=True):
                self.interpreter.resize_tensor_input(detail["index"], array.shape)
            self.interpreter.allocate_tensors()
            for detail, array in zip(self.inputs, arrays, strict=True):
                self.interpreter.set_tensor(detail["index"], array)
            self.interpreter.invoke()
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                "LiteRT must be able to run the file on these inputs; it says: "
                f"{first_line(error)}. Export it again."
            ) from error
        return {d["name"]: self.interpreter.get_tensor(d["index"]) for d in self.outputs}


def _interpreter(data: bytes, threads: int) -> Any:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise UsageError(
            "a .tflite file is compared in LiteRT, which is not installed. "
            "Install gdfq[litert], or ai-edge-litert."
        ) from error
    try:
        return Interpreter(model_content=data, num_threads=threads)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"the file must be one that LiteRT can load; it says: {first_line(error)}. "
            "Export it again."
        ) from error


def _as_file(array: np.ndarray[Any, Any], order: Order) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(array.transpose(order))


def as_network(array: np.ndarray[Any, Any], order: Order) -> np.ndarray[Any, Any]:
    """Return an array with its dimensions in the order of the network."""
    return array.transpose([order.index(dim) for dim in range(len(order))])


def litert_runner(data: bytes) -> Run:
    """Return a function that runs a `.tflite` file on tensors of the network.

    Raises:
        UsageError: The LiteRT package is not installed, or cannot load the file.
    """
    loaded = LiteInterpreter(data)

    def run(*inputs: Tensor) -> list[Tensor]:
        found = loaded(inputs)
        arrays = [found[detail["name"]] for detail in loaded.outputs]
        return [torch.from_numpy(as_network(a, usual(a.ndim)).copy()) for a in arrays]

    return run


def litert_values(
    data: bytes, orders: Mapping[str, Order], inputs: Sequence[Tensor]
) -> dict[str, np.ndarray[Any, Any]]:
    """Return tensors of a `.tflite` file for some inputs, in the network's order of dimensions.

    Args:
        data: Contents of the file.
        orders: The order of dimensions of each of the tensors, by name.
        inputs: A tensor [N, *shape] for each input of the network.
    """
    found = LiteInterpreter(with_outputs(data, list(orders)))(inputs)
    return {
        name: as_network(array, orders.get(name, usual(array.ndim)))
        for name, array in found.items()
    }
