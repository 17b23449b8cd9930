"""Batch norms that a network writes as arithmetic: x s + t with s = w / √(v + ε), t = b − m s.

Backbones of detectors freeze their batch norms so: four buffers, a product and a sum
(`torchvision.ops.FrozenBatchNorm2d`, detectron2, DETR). As batch norms they fold into the layers
before them, and their statistics are known.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.graph import operators
from gdfq.graph.constants import Constant, constants_of
from gdfq.graph.fakes import call, value_of

_RTOL, _ATOL = 1e-5, 1e-7
"""Rounding of float32 in the few operators that compute s and t."""
_MOMENTUM = 0.1
"""The default of PyTorch; a batch norm in evaluation mode does not use it."""


def recognise_batch_norms_(module: fx.GraphModule) -> None:
    """Replace arithmetic that is a batch norm in evaluation mode by the operator.

    The names of the tensors do not matter: which of them are mean, variance, weight and bias
    follows from the values that the graph computes from them.
    """
    known = constants_of(module)
    for node in list(module.graph.nodes):
        found: tuple[fx.Node, fx.Node, _Norm] | None = None
        for last, x, affine in _chain(node, known):
            norm = _norm(affine, known)
            found = found if norm is None else (last, x, norm)
        if found is not None:
            last, x, norm = found
            last.replace_all_uses_with(_written(last, x, norm, known))
    module.graph.eliminate_dead_code()


@dataclass(frozen=True, eq=False)
class _Affine:
    """y = s x + t for each channel, with what s and t are made from."""

    scale: Constant
    shift: Constant


@dataclass(frozen=True, eq=False)
class _Norm:
    """The tensors of a batch norm, each [C] but for its shape."""

    weight: fx.Node | None
    bias: fx.Node | None
    mean: fx.Node
    variance: fx.Node
    eps: float


def _chain(
    node: fx.Node, known: Mapping[fx.Node, Constant]
) -> Iterator[tuple[fx.Node, fx.Node, _Affine]]:
    """Yield ever longer chains of affine operators from a node on: the last one, x, and s and t."""
    start: fx.Node | None = None
    affine: _Affine | None = None
    while True:
        step = _step(node, known)
        if step is None:
            return
        x, own = step
        if affine is None:
            start, affine = x, own
        else:
            affine = _Affine(
                _merged(own.scale.value * affine.scale.value, own.scale, affine.scale),
                _merged(
                    own.scale.value * affine.shift.value + own.shift.value,
                    *(own.scale, own.shift, affine.shift),
                ),
            )
        assert start is not None
        yield node, start, affine
        if len(node.users) != 1:
            return
        (node,) = node.users


def _step(node: fx.Node, known: Mapping[fx.Node, Constant]) -> tuple[fx.Node, _Affine] | None:
    """Return x, s and t of one operator y = s x + t, or None."""
    name = operators.name_of(node)
    if name not in operators.AFFINE | {operators.ADDCMUL} or node in known:
        return None
    if not isinstance(node.meta.get("val"), Tensor) or value_of(node).ndim < 2:
        return None
    is_x = [isinstance(part, fx.Node) and part not in known for part in node.args]
    if sum(is_x) != 1:
        return None
    x: Any = node.args[is_x.index(True)]
    if not isinstance(value_of(x), Tensor) or value_of(x).shape != value_of(node).shape:
        return None
    parts = [None if part is x else _by_channel(part, node, known) for part in node.args]
    if any(part is None for part, own in zip(parts, is_x, strict=True) if not own):
        return None
    one, zero = Constant(torch.ones(())), Constant(torch.zeros(()))
    first = is_x[0]
    alpha = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
    if name == operators.ADDCMUL:
        if first or "value" in node.kwargs or len(parts) != 3:
            return None
        scale, shift = next(part for part in parts[1:] if part is not None), parts[0]
        assert shift is not None
        return x, _Affine(scale, shift)
    if len(parts) != 2:
        return None
    other = parts[1] if first else parts[0]
    assert other is not None
    if name == operators.MULTIPLY:
        return x, _Affine(other, zero)
    if name == operators.DIVIDE:
        return (x, _Affine(_merged(1 / other.value, other), zero)) if first else None
    if name == operators.ADD:
        if first:
            return x, _Affine(one, _merged(alpha * other.value, other))
        return (x, _Affine(one, other)) if alpha == 1 else None
    if first:
        return x, _Affine(one, _merged(-alpha * other.value, other))
    return (x, _Affine(Constant(-torch.ones(())), other)) if alpha == 1 else None


def _merged(value: Tensor, *parts: Constant) -> Constant:
    return Constant(
        value,
        tuple(dict.fromkeys(source for part in parts for source in part.sources)),
        frozenset[str]().union(*(part.operators for part in parts)),
        frozenset[float]().union(*(part.numbers for part in parts)),
    )


def _by_channel(part: Any, node: fx.Node, known: Mapping[fx.Node, Constant]) -> Constant | None:
    """Return a constant as a number or a vector [C] of channels, in float64, or None."""
    if isinstance(part, int | float):
        return Constant(torch.tensor(float(part), dtype=torch.float64))
    constant = known[part]
    value = constant.value
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    shape = value_of(node).shape
    if value.numel() != 1:
        wide = (1,) * (len(shape) - value.ndim) + tuple(value.shape)
        if wide != tuple(shape[1] if dim == 1 else 1 for dim in range(len(shape))):
            return None
    vector = value.detach().double().reshape(-1 if value.numel() != 1 else ())
    return replace(constant, value=vector)


def _norm(affine: _Affine, known: Mapping[fx.Node, Constant]) -> _Norm | None:
    """Return the batch norm that s and t are those of, or None."""
    scale, shift = affine.scale, affine.shift
    if scale.value.ndim != 1 or not scale.operators & operators.ROOTS:
        return None
    rest = [source for source in shift.sources if source not in scale.sources]
    if not 1 <= len(scale.sources) <= 2 or not 1 <= len(rest) <= 2:
        return None
    if any(known[source].value.numel() != len(scale.value) for source in (*scale.sources, *rest)):
        return None

    def vector(source: fx.Node | None, absent: float) -> Tensor:
        if source is None:
            return torch.full_like(scale.value, absent)
        return known[source].value.detach().double().reshape(-1)  # type: ignore[no-any-return]

    scales = permutations((*scale.sources, None)[:2])
    for variance, weight in scales:
        for mean, bias in permutations((*rest, None)[:2]):
            if variance is None or mean is None:
                continue
            v, w, m, b = (
                vector(source, absent)
                for source, absent in ((variance, 1.0), (weight, 1.0), (mean, 0.0), (bias, 0.0))
            )
            if not _is_close(b - m * scale.value, shift.value, b.abs() + (m * scale.value).abs()):
                continue
            for eps in sorted({0.0, *scale.numbers}):
                if bool((v + eps > 0).all()) and _is_close(w * (v + eps).rsqrt(), scale.value):
                    return _Norm(weight, bias, mean, variance, eps)
    return None


def _is_close(actual: Tensor, expected: Tensor, size: Tensor | None = None) -> bool:
    size = expected.abs() if size is None else size
    return bool(((actual - expected).abs() <= _RTOL * size + _ATOL).all())


def _written(
    before: fx.Node, x: fx.Node, norm: _Norm, known: Mapping[fx.Node, Constant]
) -> fx.Node:
    """Add the batch norm to the graph."""

    def vector(source: fx.Node | None) -> fx.Node | None:
        if source is None or known[source].value.ndim == 1:
            return source
        return call(before, operators.RESHAPE, source, [-1])

    tensors = map(vector, (norm.weight, norm.bias, norm.mean, norm.variance))
    return call(before, operators.BATCH_NORM, x, *tensors, False, _MOMENTUM, norm.eps, False)
