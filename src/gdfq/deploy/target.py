"""Targets: where an integer network is to run, in which file, and how that file is proven.

A target is a frozen value. It states what its runtime needs; the layers above ask it and never test
which target it is. User code can define its own, for instance

    def write(job):
        return my_format(job.network, job.card)      # -> bytes

    def load(data):
        return my_runtime(data)                      # -> a function from inputs to outputs

    MINE = Target("mine", ".mine", "my runtime", write, prove_by(load))
    quantized.export("student.mine", target=MINE)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, fx

from gdfq.deploy.calls import Load
from gdfq.deploy.card import Card
from gdfq.deploy.parity import FROM_EQUAL_CODES, CodesParity, Parity, compare_codes, is_equal
from gdfq.deploy.runtimes import Run
from gdfq.errors import GdfqError, UsageError
from gdfq.execution.seeding import stream
from gdfq.functional.float_grid import ALL_FORMATS, NumberFormat
from gdfq.functional.grid import MAX_BITS, MIN_BITS
from gdfq.graph import queries
from gdfq.graph.capture import Captured
from gdfq.graph.inputs import InputSpec
from gdfq.student.integer_network import ActivationGrid, IntegerNetwork, IntegerWeight
from gdfq.student.placement import activation_bits
from gdfq.student.scheme import OF_IMAGES, GridRules, Placement, Scheme

Made = TypeVar("Made")

RANGE_FACTOR = 3.0
"""Float inputs are also compared at this multiple, where activations are clipped."""
_SHORTEST = 2
"""Fewest tokens of the shorter sequence that files of language models are also compared on."""
MAX_NAMED = 3
"""Maximum number of activations that an error names when codes differ."""
ALL_BITS = tuple(range(MIN_BITS, MAX_BITS + 1))


@dataclass(frozen=True)
class Proof:
    """How a written file compares with the student."""

    inside: Parity
    """Parity on the example inputs."""
    beyond: Parity
    """Parity on float inputs three times as large, on black, white and random pixels, or on one
    sequence of half the length."""
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
        original: The model of a library that the network was made from, as `hf:ID`; None if it was
            not named.
    """

    network: IntegerNetwork
    card: Card
    path: Path
    examples: tuple[Tensor, ...]
    raw_input: bool = False
    accuracy: Mapping[str, float] | None = None
    outputs: tuple[str, ...] = ("logits",)
    original: str | None = None
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, make: Callable[["Job"], Made]) -> Made:
        """Return what a function makes of this export, made once however often it is needed."""
        if make not in self._made:
            self._made[make] = make(self)
        made: Made = self._made[make]
        return made

    def inputs(self) -> tuple[Examples, Examples]:
        """Return the example inputs, and extreme ones."""
        if not self.raw_input:
            beyond = tuple(map(_beyond, self.card.inputs, self.examples))
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


def _beyond(spec: InputSpec, x: Tensor) -> Tensor:
    """Return what an input is also compared on, from its examples [n, *shape]."""
    if spec.kind == "tokens":
        return x[:1, : max(_SHORTEST, x.shape[1] // 2)]
    return RANGE_FACTOR * x if x.is_floating_point() else x


def _no_notes(_job: Job, _data: bytes, _proof: Proof) -> Sequence[str]:
    return ()


def _nothing_beside(_job: Job, _data: bytes) -> Mapping[str, bytes]:
    return {}


def _supports_all(_graph: fx.Graph) -> Sequence[str]:
    return ()


def _fits(*_: object) -> Iterable[str]:
    return ()


@dataclass(frozen=True)
class Runtime:
    """The software that runs the files of a target, and proves them.

    Attributes:
        name: Its name, such as `ONNX Runtime`.
        module: The Python module that it is checked with.
        extra: The extra of gdfq that installs it; empty if gdfq itself needs it.
        oldest: The oldest version that runs a file, by the fewest bits of its weights: in
            ascending order the bits from which on a version is enough, and that version. Empty if
            it is not known.
        calls: Loads a file to be timed; None if files of this runtime are not timed.
    """

    name: str
    module: str
    extra: str = ""
    oldest: tuple[tuple[int, str], ...] = ()
    calls: Load | None = None

    @property
    def is_installed(self) -> bool:
        return find_spec(self.module) is not None

    @property
    def installation(self) -> str:
        """The command that installs it; what installs gdfq if gdfq itself needs it."""
        return f"pip install '{f'gdfq[{self.extra}]' if self.extra else 'gdfq'}'"

    def oldest_for(self, network: IntegerNetwork) -> str | None:
        """Return the oldest version that runs the file of a network; None if it is not known."""
        fewest = min(network.code_bits().values(), default=MAX_BITS)
        found = [version for bits, version in self.oldest if bits <= fewest]
        return found[-1] if found else None

    @property
    def absence(self) -> str:
        """What is missing, and what installs it; empty if it is installed. It is not imported."""
        if self.is_installed:
            return ""
        return (
            f"a file for {self.name} is kept only if it is equal there, so {self.name} must be "
            f"installed; the module {self.module!r} is not found. Install it with: "
            f"{self.installation}"
        )


@dataclass(frozen=True)
class Carrier:
    """What holds codes in a runtime, and which grids it can hold.

    Attributes:
        kind: The type of the codes, for people: `int8`.
        bits: Bits that the codes of the student's integer grids may have.
        symmetric: Whether zero points must be 0.
        formats: Formats that the student's floating-point grids may have.
    """

    kind: str
    bits: tuple[int, ...] = ALL_BITS
    symmetric: bool = False
    formats: tuple[NumberFormat, ...] = ()

    def refusal(
        self,
        bits: int,
        zero_point: Tensor | None = None,
        forms: Sequence[NumberFormat] | None = None,
    ) -> str:
        """Return why a grid does not fit, or an empty text.

        Args:
            bits: Bits of its codes.
            zero_point: Its zero points, where they are known.
            forms: Formats of a floating-point grid of which it will have one; None for an integer
                grid.
        """
        if forms is not None:
            fits = any(form in self.formats for form in forms)
            named = f" {forms[0].name}" if len(forms) == 1 else ""
            return "" if fits else f"a floating-point grid{named} of {bits} bits"
        if bits not in self.bits:
            return f"{bits} bits"
        if self.symmetric and zero_point is not None and bool(zero_point.any()):
            return "zero points other than 0"
        return ""

    def refusal_of(self, found: IntegerWeight | ActivationGrid) -> str:
        """Return why the grid of a finished network does not fit, or an empty text."""
        forms = None if found.form is None else (found.form,)
        return self.refusal(found.bits, found.zero_point, forms)

    def holds_bits_of(self, found: IntegerWeight | ActivationGrid) -> bool:
        """Return whether there is a grid of the same bits and kind that fits."""
        if found.form is not None:
            return found.form.bits in {form.bits for form in self.formats}
        return found.bits in self.bits

    def in_words(self) -> str:
        """Return type and grids: `int8, 2 to 8 bits, zero points of 0`."""
        return f"{self.kind}, {self.grids_in_words()}"

    def grids_in_words(self) -> str:
        """Return the grids that fit: `2 to 8 bits, zero points of 0`."""
        first, last = self.bits[0], self.bits[-1]
        bits = f"{first} to {last}"
        if first == last:
            bits = str(first)
        elif self.bits != tuple(range(first, last + 1)):
            bits = " or ".join(map(str, self.bits))
        zeros = ", zero points of 0" if self.symmetric else ""
        if not self.formats:
            return f"{bits} bits{zeros}"
        takes_all = set(self.formats) == set(ALL_FORMATS)
        names = "any format" if takes_all else " or ".join(form.name for form in self.formats)
        return f"{bits} bits{zeros}, floating-point grids of {names}"


@dataclass(frozen=True)
class Target:
    """Where an integer network is to run, and the file that it becomes for that.

    Attributes:
        name: Name of the target in options.
        suffix: End of the names of its files, such as `.onnx`.
        summary: Purpose, in a few words.
        write: Returns the contents of the file. Raises UsageError for an unsupported network.
        prove: Loads the written file in its own runtime and compares it with the student. Raises
            GdfqError if they differ.
        notes: Returns remarks about the written file for the user.
        raw_input: Whether its files can take uint8 pixels.
        may_saturate: Whether kernels of its runtime add products in 16 bits on some processors
            (`gdfq.deploy.saturation`).
        runtime: The runtime that proves its files.
        weights: What holds the codes of weights.
        activations: What holds the codes of activations.
        placements: The placements that the runtime computes as the student does.
        layout: Order of the dimensions of images.
        equality: What is compared before a file is kept, for people.
        unsupported: Returns the operators of a teacher's or an integer network's graph that the
            runtime cannot express, each named with its layer or node.
        takes_size: Whether `--bits auto` can choose bits for the size of its files.
        loads_code: Whether a file can hold code that runs when it is loaded. Files that others may
            have written are then not loaded.
        one_grid_for_joins: Whether the inputs of a concatenation and its result must have one grid.
        beside: Returns further files that are written beside the file, from its contents: the ends
            of their names, in place of the suffix, with their contents. Raises GdfqError for one
            that is not equal; then none of them is written.
        made_for: What its files are made for, where that is not here to run them: their form is
            checked, and they are proven in `runtime`. Empty if they are made for `runtime`.
        holds_weights_alone: Whether its files hold weights for the code of the original network,
            so that layers get no operators and no biases that they had not.
        file_in_folder: Name of its file, where that lies in a folder of its own with further ones
            (`beside`, by their names); the path of an export is then this folder.
        refusals: Returns what else its files cannot express of a teacher with a scheme.
        misfits: Returns what else its files cannot express of a finished network.
    """

    name: str
    suffix: str
    summary: str
    write: Callable[[Job], bytes]
    prove: Callable[[Job, Path], Proof]
    notes: Callable[[Job, bytes, Proof], Sequence[str]] = _no_notes
    raw_input: bool = False
    may_saturate: bool = False
    runtime: Runtime | None = None
    weights: Carrier = Carrier("int8")
    activations: Carrier = Carrier("int8")
    placements: tuple[Placement, ...] = OF_IMAGES
    layout: Literal["nchw", "nhwc"] = "nchw"
    equality: str = "outputs"
    unsupported: Callable[[fx.Graph], Sequence[str]] = _supports_all
    takes_size: bool = False
    loads_code: bool = False
    one_grid_for_joins: bool = False
    beside: Callable[[Job, bytes], Mapping[str, bytes]] = _nothing_beside
    made_for: str = ""
    holds_weights_alone: bool = False
    file_in_folder: str = ""
    refusals: Callable[[Captured, Scheme], Iterable[str]] = _fits
    misfits: Callable[[IntegerNetwork], Iterable[str]] = _fits

    @property
    def file_name(self) -> str:
        """Name of its file, or of its folder, in the folder of a run."""
        return f"student{self.suffix}"

    @property
    def grids(self) -> GridRules:
        """What the grids of a network must fulfil for this target, beside their bits."""
        return GridRules(
            self.weights.symmetric,
            self.activations.symmetric,
            self.one_grid_for_joins,
            self.weights.formats or self.activations.formats or ALL_FORMATS,
        )

    def file_at(self, path: Path) -> Path:
        """Return the path of its file, of an export with this path."""
        return path / self.file_in_folder if self.file_in_folder else path

    def path_beside(self, path: Path, suffix: str) -> Path:
        """Return the path of a further file beside one of its files."""
        if self.file_in_folder:
            return path.with_name(suffix)
        return path.with_name(path.name.removesuffix(self.suffix) + suffix)

    @property
    def unproven(self) -> str:
        """What was not proven, for people; empty if its files run in the runtime they are for."""
        return self.made_for and f"form checked, not run in {self.made_for}"

    def require_runtime(self) -> None:
        """Raise UsageError if the runtime that proves its files is not installed."""
        if self.runtime is not None and (absence := self.runtime.absence):
            raise UsageError(absence)

    def check_scheme(self, teacher: Captured, scheme: Scheme) -> None:
        """Check, before a run, that its result will fit this target.

        Args:
            teacher: The captured network.
            scheme: What is quantized, to how many bits.

        Raises:
            UsageError: An operator has no form in the runtime, or a layer or an activation has
                bits that it cannot hold.
        """
        self._check_placement(scheme.placement)
        self._check_operators(teacher.network.graph)
        layers = queries.weighted_layers(teacher.network)
        weights = (
            (
                queries.layer_name(node),
                self.weights.refusal(bits, forms=scheme.weight_formats(bits)),
            )
            for node, bits in scheme.weight_bits(layers).items()
        )
        activations = (
            (node.name, self.activations.refusal(bits, forms=scheme.activation_formats(bits)))
            for node, bits in activation_bits(teacher, scheme).items()
        )
        if text := _in_words((*weights, *activations), self.refusals(teacher, scheme)):
            raise UsageError(
                f"{self._needs()} the run would give {text}. Choose other --bits or --layer-bits, "
                "or another target: gdfq targets."
            )

    def check_network(self, network: IntegerNetwork, placement: Placement) -> None:
        """Check that a finished network fits this target.

        Args:
            network: The frozen student.
            placement: Its placement.

        Raises:
            UsageError: It does not; the text says which layers and activations would have to be
                quantized again.
        """
        self._check_placement(placement)
        self._check_operators(network.graph)
        found = [
            *((weight.name, self.weights.refusal_of(weight)) for weight in network.weights),
            *((grid.name, self.activations.refusal_of(grid)) for grid in network.activations),
            *(_unequal_joins(network) if self.one_grid_for_joins else ()),
        ]
        if text := _in_words(found, self.misfits(network)):
            holds_bits = all(map(self.weights.holds_bits_of, network.weights)) and all(
                map(self.activations.holds_bits_of, network.activations)
            )
            others = "" if holds_bits else " and other --bits"
            raise UsageError(
                f"{self._needs()} this network has {text}. Quantize it again with --target "
                f"{self.name}{others}, or choose another target: gdfq targets."
            )

    def _check_operators(self, graph: fx.Graph) -> None:
        if found := list(self.unsupported(graph)):
            raise UsageError(
                f"each operator of the network must have a form in a file of target {self.name!r}; "
                f"there is none for: {listed(found)}. Choose another target: gdfq targets."
            )

    def _check_placement(self, placement: Placement) -> None:
        if placement == "tokens" and placement not in self.placements:
            raise UsageError(
                f"target {self.name!r} holds no language model: it has no form for scales of "
                "tokens. Use target 'onnx', 'compressed-tensors', or 'safetensors', which "
                "gdfq.load reads."
            )
        if self.placements == ("tokens",) and placement != "tokens":
            raise UsageError(
                f"target {self.name!r} holds causal language models alone; the network is none. "
                "Choose another target: gdfq targets."
            )
        if placement not in self.placements:
            raise UsageError(
                f"target {self.name!r} needs placement {' or '.join(self.placements)}; the "
                f"network's is {placement}. Quantize it with --placement {self.placements[0]}."
            )

    def _needs(self) -> str:
        return (
            f"target {self.name!r} takes weights of {self.weights.grids_in_words()} and "
            f"activations of {self.activations.grids_in_words()}"
            f"{', with one grid for each concatenation' if self.one_grid_for_joins else ''};"
        )


def _unequal_joins(network: IntegerNetwork) -> Iterator[tuple[str, str]]:
    """Yield the concatenations with more than one grid, by the names of these."""
    for join in network.joins:
        grids = {(float(grid.scale), float(grid.zero_point), grid.bits) for grid in join}
        if len(grids) > 1:
            yield " and ".join(dict.fromkeys(grid.name for grid in join)), "several grids"


def _in_words(found: Iterable[tuple[str, str]], others: Iterable[str]) -> str:
    """Return what does not fit, by reason: `4 bits in conv1, fc; several grids in cat`.

    Args:
        found: Names of layers or activations, each with why it does not fit; empty if it does.
        others: What else does not fit.
    """
    names: dict[str, list[str]] = {}
    for name, why in found:
        if why:
            names.setdefault(why, []).append(name)
    parts = [f"{why} in {listed(those)}" for why, those in names.items()]
    return "; ".join(filter(None, [*parts, listed(list(others))]))


_MAX_LISTED = 20
"""Maximum number of layers and activations that a refusal names."""


def listed(found: Sequence[str]) -> str:
    """Return names as a list that stays readable for a deep network."""
    more = len(found) - _MAX_LISTED
    return ", ".join(found[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


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


Values = Callable[[Sequence[str], Sequence[Tensor]], Mapping[str, np.ndarray[Any, Any]]]
"""Names of values inside a file, or of outputs, and a tensor for each input -> these values."""


def prove_codes(
    job: Job,
    run: Run,
    values: Values,
    stored: Mapping[str, Any],
    *,
    same_beside_codes: bool = False,
) -> Proof:
    """Compare the outputs of a file with the student's, and each code from equal inputs.

    Args:
        job: The export.
        run: The runtime.
        values: The runtime, asked for values inside the file.
        stored: How the file stores the codes of each activation, as `compare_codes` takes it.
        same_beside_codes: Whether the outputs must be the same when no codes are asked for. A
            runtime that fuses the rounding of a code away computes others.

    Raises:
        GdfqError: The outputs differ by more than rounding does, or codes do.
    """
    names = [codes.name for codes in stored.values()]

    def of(examples: Examples) -> tuple[Parity, list[CodesParity]]:
        found = values([*names, *job.outputs], examples.file)
        codes, expected = compare_codes(job.network, examples.student, found, stored)
        beside = [torch.from_numpy(found[name]) for name in job.outputs]
        parity = compare(job, run, examples, codes, beside)
        _check_from_equal_codes(job, expected, beside)
        if same_beside_codes:
            _check_from_equal_codes(job, beside, run(*examples.file))
        return parity, codes

    (inside, codes), (beyond, _) = map(of, job.inputs())
    differing = [(found.name, found.differ) for found in codes if found.differ]
    return Proof(inside, beyond, tuple(differing[:MAX_NAMED]))


def _check_from_equal_codes(job: Job, expected: Sequence[Tensor], actual: Sequence[Tensor]) -> None:
    """Raise GdfqError where outputs from equal codes differ by more than the rounding of floats."""
    error = Parity.of(expected, actual, classes=False).relative_error
    if not error <= FROM_EQUAL_CODES:
        raise GdfqError(
            "outputs must differ by the rounding of floats alone where codes are equal; those "
            f"of {job.path.name} are {error:.2%} off. It was not kept; report the network."
        )


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
