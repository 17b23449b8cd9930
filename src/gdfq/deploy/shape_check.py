"""A check of stored networks before they run, with shapes only, so that nothing is allocated.

An untrusted file may have a wrong card, and operators that need more memory than there is.
"""

import math
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.deploy.card import Card
from gdfq.errors import UsageError, first_line
from gdfq.files.untrusted import MAX_TENSOR_ELEMENTS
from gdfq.graph import operators
from gdfq.graph.outputs import count_of, in_order
from gdfq.student.integer_network import IntegerNetwork, check_quantizer

_BATCH_SIZE = 2
"""Images per check; a batch of one could hide a missing dimension."""


def rehearse(network: IntegerNetwork, card: Card) -> None:
    """Check that a stored network takes the inputs and gives the outputs of its card.

    Its quantizers must have the form that freezing writes, and no tensor may have more than
    `MAX_TENSOR_ELEMENTS` elements for one image.

    Raises:
        UsageError: A check fails.
    """
    try:
        with torch.no_grad():
            inputs = [spec.zeros(_BATCH_SIZE, "meta") for spec in card.inputs]
            outputs = in_order(_Rehearsal(network.module).run(*inputs))
            fits = all(isinstance(output, Tensor) and output.ndim for output in outputs)
            shapes = [list(output.shape) for output in outputs] if fits else []
    except Exception as error:  # any exception, because the arguments are untrusted
        raise _refused(first_line(error)) from error
    if not fits or len(outputs) != count_of(card.outputs):
        raise _refused(f"it has {len(outputs)} outputs, of which its card says others")
    if any(shape[0] != _BATCH_SIZE for shape in shapes):
        raise _refused(f"of {_BATCH_SIZE} images it makes {shapes}")
    if card.classes is not None and any(s != [_BATCH_SIZE, card.classes] for s in shapes):
        raise _refused(f"it makes {shapes} for {card.classes} classes")


_CREATIONS = frozenset(map(operators.resolve, operators.CREATIONS))


class _Rehearsal(fx.Interpreter):
    """Runs a graph on PyTorch's meta device, whose tensors only have shapes, and checks each."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().get_attr(target, args, kwargs).to("meta")

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in _CREATIONS:
            kwargs = {**kwargs, "device": "meta"}
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        check_quantizer(n)
        value = super().run_node(n)
        if isinstance(value, Tensor) and math.prod(value.shape) > _BATCH_SIZE * MAX_TENSOR_ELEMENTS:
            raise ValueError(f"{n.name!r} would have {list(value.shape)} numbers")
        if isinstance(value, Tensor) and n.op != "get_attr":
            n.meta["val"] = value  # the memory budget reads it
        return value


def _refused(reason: str) -> UsageError:
    return UsageError(
        f"a stored network must run on images of the size that it gives; this one does not: "
        f"{reason}. Make it again with gdfq quantize."
    )
