"""Targets: kinds of files that an integer network is written as, each with its parity check.

A target is a frozen value. User code can define its own, for instance

    def write(job):
        return my_format(job.network, job.card)      # -> bytes

    def load(data):
        return my_runtime(data)                      # -> a function from inputs to outputs

    MINE = Target("mine", ".mine", "my runtime", write, prove_by(load))
    quantized.export("student.mine", target=MINE)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gdfq.deploy.card import Card
from gdfq.deploy.parity import FROM_EQUAL_CODES, CodesParity, Parity, is_equal
from gdfq.deploy.runtimes import Run
from gdfq.errors import GdfqError
from gdfq.execution.seeding import stream
from gdfq.student.integer_network import IntegerNetwork

RANGE_FACTOR = 3.0
"""Float inputs are also compared at this multiple, where activations are clipped."""
MAX_NAMED = 3
"""Maximum number of activations that an error names when codes differ."""


@dataclass(frozen=True)
class Proof:
    """How a written file compares with the student."""

    inside: Parity
    """Parity on the example inputs."""
    beyond: Parity
    """Parity on float inputs three times as large, or on black, white and random pixels."""
    differs_first: tuple[tuple[str, float], ...] = ()
    """ONNX: the first activations with codes that differ, and the share of these codes."""
    saturates_here: bool = False
    """ONNX: equal only in a session without saturation (`runtimes.PRECISE`) on this processor."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs to compare on: as the student takes them, and as the file does."""

    student: tuple[Tensor, ...]
    file: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Job:
    """An export: the network, its examples and its options.

    Attributes:
        network: The frozen student, on the CPU.
        card: The card of the network.
        path: Path of the file.
        examples: A tensor [n, *shape] for each input of the network, to compare on.
        raw_input: Whether the file takes uint8 pixels and normalises them itself.
        accuracy: Top-1 in percent, by name, for the file's metadata.
        outputs: Names of the outputs.
    """

    network: IntegerNetwork
    card: Card
    path: Path
    examples: tuple[Tensor, ...]
    raw_input: bool = False
    accuracy: Mapping[str, float] | None = None
    outputs: tuple[str, ...] = ("logits",)

    def inputs(self) -> tuple[Examples, Examples]:
        """Return the example inputs, and extreme ones."""
        if not self.raw_input:
            beyond = tuple(RANGE_FACTOR * x if x.is_floating_point() else x for x in self.examples)
            return Examples(self.examples, self.examples), Examples(beyond, beyond)
        preprocessing = self.card.preprocessing
        (images,) = self.examples
        pixels = preprocessing.pixels(images)
        draw = stream(0, "export.pixels")
        extreme = torch.randint(256, pixels.shape, dtype=torch.uint8, generator=draw)
        black, white = (torch.full_like(extreme[:1], value) for value in (0, 255))
        extreme = torch.cat([black, white, extreme])
        return (
            Examples((preprocessing(pixels),), (pixels,)),
            Examples((preprocessing(extreme),), (extreme,)),
        )


def _no_notes(_job: Job, _data: bytes, _proof: Proof) -> Sequence[str]:
    return ()


@dataclass(frozen=True)
class Target:
    """A kind of file for deployment.

    Attributes:
        name: Name of the target in options.
        suffix: Suffix of its files, such as `.onnx`.
        summary: Purpose, in a few words.
        write: Returns the contents of the file. Raises UsageError for an unsupported network.
        prove: Loads the written file in its own runtime and compares it with the student. Raises
            GdfqError if they differ.
        notes: Returns remarks about the written file for the user.
        raw_input: Whether its files can take uint8 pixels.
    """

    name: str
    suffix: str
    summary: str
    write: Callable[[Job], bytes]
    prove: Callable[[Job, Path], Proof]
    notes: Callable[[Job, bytes, Proof], Sequence[str]] = _no_notes
    raw_input: bool = False


def prove_by(load: Callable[[bytes], Run]) -> Callable[[Job, Path], Proof]:
    """Return the `prove` of a target whose files run as a function.

    Args:
        load: Returns, for the contents of a file, a function from one tensor per input to the
            outputs in order.
    """

    def prove(job: Job, written: Path) -> Proof:
        run = load(written.read_bytes())
        inside, beyond = (compare(job, run, examples) for examples in job.inputs())
        return Proof(inside, beyond)

    return prove


@torch.no_grad()
def compare(
    job: Job,
    run: Run,
    examples: Examples,
    codes: Sequence[CodesParity] = (),
    beside_codes: Sequence[Tensor] = (),
) -> Parity:
    """Return the parity of a runtime with the student on some inputs.

    If each code is the nearest one to its number, given equal inputs, and the outputs are those
    found beside these codes, the file is equal, however much a network amplifies rounding.

    Args:
        job: The export.
        run: The runtime.
        examples: The inputs.
        codes: Parity of the codes, if the runtime can tell them.
        beside_codes: The runtime's outputs when it was asked for the codes.

    Raises:
        GdfqError: The outputs differ by more than rounding does, or codes do.
    """
    expected, actual = job.network.outputs(*examples.student), run(*examples.file)
    parity = Parity.of(expected, actual, job.card.classes is not None)
    wrong = [found for found in codes if not found.only_rounded]
    proven = bool(beside_codes) and not any(found.wrong for found in codes)
    proven = proven and Parity.of(beside_codes, actual, False).relative_error <= FROM_EQUAL_CODES
    if proven or (not wrong and is_equal(job.network, examples.student, parity)):
        return parity
    first = wrong or [found for found in codes if found.differ]
    named = ", ".join(f"{found.differ:.2%} of {found.name!r}" for found in first[:MAX_NAMED])
    raise GdfqError(
        "an exported file must give the student's outputs, and its codes but for rounding; "
        f"{job.path.name} is {parity}."
        + (f" Codes that differ first, from equal inputs: {named}." if named else "")
        + " It was not kept; report the network."
    )
