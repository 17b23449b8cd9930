"""Size and speed of an exported network beside full precision, in ONNX Runtime on the CPU."""

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from gdfq import operators
from gdfq.capture import flat_module, tensors_of
from gdfq.runtimes import onnx_session

BATCHES, THREADS = (1, 32), (1, 2)
_FEWEST = 11
"""Rounds of every measurement, however long they take."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call of one file, at one batch size and number of threads."""

    batch: int
    threads: int
    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""

    @property
    def images_per_second(self) -> float:
        return 1000 * self.batch / self.median


def side_by_side(
    files: Sequence[bytes],
    *,
    seconds: float = 1.0,
    batches: Sequence[int] = BATCHES,
    threads: Sequence[int] = THREADS,
) -> Iterator[list[Timing]]:
    """Time ONNX files in turn, so that what disturbs one disturbs all: one list a setting.

    Settings are each batch size with each number of threads that the machine has. Every setting
    takes about `seconds` for each file.
    """
    cores = os.cpu_count() or 1
    for count in (n for n in threads if n <= cores):
        sessions = [onnx_session(data, count) for data in files]
        for batch in batches:
            runs = [_feed(session, batch) for session in sessions]
            yield [Timing(batch, count, *spread) for spread in _measured(sessions, runs, seconds)]


def _feed(session: Any, batch: int) -> dict[str, np.ndarray[Any, Any]]:
    (first,) = session.get_inputs()
    draw = np.random.default_rng(0)
    shape = (batch, *first.shape[1:])
    if first.type == "tensor(uint8)":
        return {first.name: draw.integers(0, 256, shape, dtype=np.uint8)}
    return {first.name: draw.standard_normal(shape, dtype=np.float32)}


def _measured(
    sessions: Sequence[Any], feeds: Sequence[dict[str, Any]], seconds: float
) -> list[tuple[float, float, float]]:
    """Median, first and third quartile of each session's milliseconds, taken in turn."""
    times: list[list[float]] = [[] for _ in sessions]
    for session, feed in zip(sessions, feeds, strict=True):
        session.run(None, feed)  # the first call allocates
    until = time.perf_counter() + seconds * len(sessions)
    while time.perf_counter() < until or len(times[0]) < _FEWEST:
        for session, feed, found in zip(sessions, feeds, times, strict=True):
            started = time.perf_counter()
            session.run(None, feed)
            found.append(1000 * (time.perf_counter() - started))
    quartiles = [statistics.quantiles(found, n=4) for found in times]
    return [(middle, low, high) for low, middle, high in quartiles]


@torch.no_grad()
def in_full_precision(network: fx.GraphModule) -> fx.GraphModule:
    """A frozen network with float weights and no rounding: what it was before, as fast and large.

    Its weights are the quantized ones, written as floats.
    """
    tensors = dict(tensors_of(network))
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}

    def constant(node: fx.Node, function: Any) -> fx.Node:
        args, _ = fx.node.map_arg((node.args, {}), lambda n: tensors[str(n.target)])
        name = f"{node.args[0].target}_float"  # type: ignore[union-attr]
        value: Tensor = function(*args)
        tensors[name] = torch.nn.Parameter(value, requires_grad=False)
        return graph.get_attr(name)

    for node in network.graph.nodes:
        name = operators.name_of(node)
        if name == "gdfq.fake_quantize":
            new[node] = new[node.args[0]]
        elif name in {"gdfq.dequantize", "gdfq.dequantize_bias"}:
            new[node] = constant(node, node.target)
        else:
            new[node] = graph.node_copy(node, new.__getitem__)
    graph.eliminate_dead_code()
    return flat_module(graph, tensors)
