"""The target `litert-micro`: files of int8 operators, equal in TFLite Micro to the last code.

The kernels round twice (`gdfq.functional.gemmlowp`). A file is compared with a simulation that does
so, too, and its outputs with the student's, which rounds once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdfq.deploy.litert.carriers import carriers_of
from gdfq.deploy.litert.layout import Order, usual
from gdfq.deploy.litert.runtime import as_network
from gdfq.deploy.litert.writer import WrittenFile
from gdfq.deploy.litert_micro.operators import unsupported
from gdfq.deploy.litert_micro.outputs import with_output_grids
from gdfq.deploy.litert_micro.runtime import micro_values
from gdfq.deploy.litert_micro.simulation import Simulated, simulated
from gdfq.deploy.litert_micro.writer import to_micro
from gdfq.deploy.metadata import facts_of
from gdfq.deploy.parity import Parity, is_equal
from gdfq.deploy.shape_check import rehearse
from gdfq.deploy.target import MAX_NAMED, Carrier, Job, Proof, Runtime, Target
from gdfq.errors import GdfqError
from gdfq.graph import queries
from gdfq.graph.ends import Kind, body_names, split
from gdfq.student.integer_network import ActivationGrid, IntegerNetwork

_MAX_IMAGES = 16
"""Most examples that a file is compared on: reference kernels are slow."""


@dataclass(frozen=True, eq=False)
class _Subject:
    """What is written and compared.

    Attributes:
        student: The network in front of a last softmax or sigmoid.
        network: The same with outputs on grids.
        names: Names of the outputs.
        grids: Names of the grids of the outputs.
        usual: Examples as usual, for each input.
        beyond: Examples out of range.
    """

    student: IntegerNetwork
    network: IntegerNetwork
    names: list[str]
    grids: list[str]
    usual: tuple[Tensor, ...]
    beyond: tuple[Tensor, ...]


@torch.no_grad()
def _subject(job: Job) -> _Subject:
    rehearse(job.network, job.card)  # the graph then knows its shapes
    body, ends = split(job.network.module)
    student = IntegerNetwork(body).eval()
    plain: Kind = "values"
    names = body_names(job.card, replace(ends, kinds=(plain,) * len(ends.kinds)))
    inside, beyond = (tuple(x[:_MAX_IMAGES] for x in examples.student) for examples in job.inputs())
    # The range of extreme inputs, too: an application's may give more than a few examples do.
    values = [
        torch.cat([a.flatten(), b.flatten()])
        for a, b in zip(student.outputs(*inside), student.outputs(*beyond), strict=True)
    ]
    network, grids = with_output_grids(student, names, values)
    return _Subject(student, network, names, grids, inside, beyond)


def _file(job: Job) -> WrittenFile:
    subject = job.once(_subject)
    known = {name: text for name, text in facts_of(job.card, job.accuracy or {}).items() if text}
    return to_micro(subject.network, job.card.inputs, known, subject.names)


def _write(job: Job) -> bytes:
    return job.once(_file).data


def _prove(job: Job, written: Path) -> Proof:
    subject, data = job.once(_subject), written.read_bytes()
    orders = job.once(_file).orders

    def of(examples: tuple[Tensor, ...]) -> Parity:
        simulation = _simulated(subject.network, examples)
        found = micro_values(data, _inputs(subject.network, simulation.codes))
        _check_equal(job, subject, simulation, found, orders)
        scales = {grid.name: grid.scale for grid in subject.network.activations}
        actual = [
            u.float() * scales[grid]
            for u, grid in zip(simulation.outputs, subject.grids, strict=True)
        ]
        expected = subject.student.outputs(*examples)
        parity = Parity.of(expected, actual, job.card.classes is not None)
        if not is_equal(subject.student, examples, parity):
            raise GdfqError(
                "a file for TFLite Micro, which rounds twice, must give the student's outputs but "
                f"for rounding; {job.path.name} is {parity}. It was not kept: quantize to more "
                "bits, for instance w8a8."
            )
        return parity

    return Proof(of(subject.usual), of(subject.beyond))


def _simulated(network: IntegerNetwork, inputs: Sequence[Tensor]) -> Simulated:
    try:
        return simulated(network, inputs)
    except OverflowError as error:
        raise GdfqError(
            f"sums must fit into 32 bits in TFLite Micro; {error}. Choose another target: gdfq "
            "targets."
        ) from error


def _inputs(
    network: IntegerNetwork, codes: Mapping[str, Tensor]
) -> list[list[np.ndarray[Any, Any]]]:
    """Return the codes of each input as a file takes them, one entry of the batch at a time."""
    stored = carriers_of(network)
    given = []
    for node in queries.inputs(network.graph):
        (grid,) = (g for g in network.activations if g.node in node.users)
        array = (codes[grid.name] + stored[grid.name].grid.zero_point).numpy().astype(np.int8)
        array = array.transpose(usual(array.ndim))
        given.append([array[index : index + 1] for index in range(len(array))])
    return given


def _check_equal(
    job: Job,
    subject: _Subject,
    simulation: Simulated,
    found: Mapping[str, np.ndarray[Any, Any]],
    orders: Mapping[str, Order],
) -> None:
    """Raise GdfqError if a code of the runtime is not that of the simulation."""
    stored = carriers_of(subject.network)
    compared = [
        (grid.name, stored[grid.name], simulation.codes[grid.name], stored[grid.name].name)
        for grid in _written(subject.network)
        if stored[grid.name].name in found  # an output has its own name
    ]
    for name, grid, u in zip(subject.names, subject.grids, simulation.outputs, strict=True):
        compared.append((name, stored[grid], u, name))
    differing = []
    for name, carrier, u, key in compared:
        array = found[key]
        expected = u.numpy() + carrier.grid.zero_point
        order = orders[key] if key in orders else usual(array.ndim)
        actual = as_network(array, order).reshape(expected.shape)
        if share := float((actual != expected).mean()):
            differing.append(f"{share:.2%} of {name!r}")
    if differing:
        raise GdfqError(
            "TFLite Micro must give the codes of the simulation; others are: "
            f"{', '.join(differing[:MAX_NAMED])}. {job.path.name} was not kept; report the network."
        )


def _written(network: IntegerNetwork) -> list[ActivationGrid]:
    """Return the grids that operators of a file write."""
    given = set(queries.inputs(network.graph))
    return [grid for grid in network.activations if queries.input_of(grid.node) not in given]


def _notes(job: Job, _data: bytes, _proof: Proof) -> Sequence[str]:
    subject = job.once(_subject)
    stored = carriers_of(subject.network)
    grids = {grid.node: grid for grid in subject.network.activations}
    found = [
        f"input {node.name!r} is int8: round(x / {stored[grid.name].scale:.9g}) + "
        f"{stored[grid.name].grid.zero_point}, clipped to "
        f"{stored[grid.name].lowest} to 127"
        for node in queries.inputs(subject.network.graph)
        for reader, grid in grids.items()
        if reader in node.users
    ]
    if subject.names != list(job.outputs):
        found.append(f"the file ends before the last function: it returns {subject.names[0]}")
    return found


LITERT_MICRO = Target(
    "litert-micro",
    ".micro.tflite",
    "runs as integers in TFLite Micro, on microcontrollers",
    _write,
    _prove,
    _notes,
    runtime=Runtime("TFLite Micro", "tflite_micro", "litert-micro"),
    weights=Carrier("int8"),
    activations=Carrier("int8"),
    placements=("full",),
    layout="nhwc",
    equality="every code with the two roundings of TFLite Micro, and the outputs but for rounding",
    unsupported=unsupported,
)
