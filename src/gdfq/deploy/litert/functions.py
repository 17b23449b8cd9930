"""All operators that compute floats from floats."""

from collections.abc import Mapping
from typing import Any

import torch

from gdfq.deploy.litert.averages import AVERAGES
from gdfq.deploy.litert.elementwise import ELEMENTWISE, Function, Operand, Shape
from gdfq.deploy.litert.emitter import Emitter, NoFormError, Value
from gdfq.deploy.litert.moves import with_last
from gdfq.deploy.litert.norms import NORMS


def _softmax(emit: Emitter, name: str, _shape: Shape, x: Value, dim: int, *_: Any) -> Value:
    return emit.operator("SOFTMAX", *with_last(emit, name, x, dim), "SoftmaxOptions", beta=1.0)


def _log_softmax(emit: Emitter, name: str, _shape: Shape, x: Value, dim: int, *_: Any) -> Value:
    return emit.operator("LOG_SOFTMAX", *with_last(emit, name, x, dim))


def _product(emit: Emitter, name: str, shape: Shape, x: Operand, y: Operand) -> Value:
    """A product of matrices, of which one may be constant."""
    like = x if isinstance(x, Value) else y
    assert isinstance(like, Value)
    rank = len(like.shape)
    if min(len(getattr(value, "shape", ())) for value in (x, y)) < 2:
        raise NoFormError("a product with a vector")
    x, y = (
        value
        if isinstance(value, Value)
        else emit.constant(
            "matrix", torch.as_tensor(value), emit.in_order(like, tuple(range(rank)))
        )
        for value in (x, y)
    )
    x, y = (emit.in_order(emit.of_rank(v, len(shape)), tuple(range(len(shape)))) for v in (x, y))
    result = emit.new(name, shape, x.order)
    return emit.operator("BATCH_MATMUL", result, [x, y], "BatchMatMulOptions")


FUNCTIONS: Mapping[str, Function] = {
    **ELEMENTWISE,
    **AVERAGES,
    **NORMS,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    **dict.fromkeys(("bmm", "matmul"), _product),
}
"""By the short name of the operator (`operators.short_name`)."""
