"""Export: a file is kept only when its own runtime gives what the student gives."""

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, fx

from gdfq.deploy.card import Card
from gdfq.deploy.onnx.passes import PIXELS
from gdfq.deploy.onnx.writer import codes_name, to_onnx
from gdfq.deploy.parity import FROM_EQUAL_CODES, CodesParity, Parity, compare_codes, is_equal
from gdfq.deploy.runtimes import (
    PRECISE,
    Run,
    computed_in_float,
    onnx_runner,
    onnx_values,
    program_runner,
)
from gdfq.deploy.safetensors import from_safetensors, header_bytes, to_safetensors
from gdfq.deploy.saturation import layers_that_may_overflow
from gdfq.deploy.torch_export import to_program
from gdfq.errors import GdfqError, UsageError
from gdfq.execution.seeding import stream
from gdfq.files.atomic import make_folder, write_checked
from gdfq.graph import operators
from gdfq.graph.outputs import in_order, output_names
from gdfq.student.freeze import narrowed

Format = Literal["onnx", "pt2", "safetensors"]

BEYOND = 3.0
"""Images are also compared at this multiple, where activations must saturate alike."""
_NAMED = 3
"""Activations that are named when codes differ."""


@dataclass(frozen=True)
class Proof:
    """How a written file compares with the student."""

    inside: Parity
    """On images as they come."""
    beyond: Parity
    """On images three times as large; for a file that takes pixels, on black, white and random."""
    differs_first: tuple[tuple[str, float], ...] = ()
    """ONNX: the first activations of which some codes differ, and the share that does."""
    saturates_here: bool = False
    """ONNX: equal only in a session without saturation (`runtimes.PRECISE`) on this processor."""


@dataclass(frozen=True)
class Exported(Proof):
    """What was written, and how it compares with the student."""

    path: Path = field(kw_only=True)
    format: Format = field(kw_only=True)
    bytes: int = field(kw_only=True)
    sha256: str = field(kw_only=True)
    notes: tuple[str, ...] = field(kw_only=True)

    def as_values(self) -> dict[str, object]:
        """The same as plain values, for JSON."""
        return {**asdict(self), "path": self.path.name}


def export(
    network: fx.GraphModule,
    card: Card,
    path: Path,
    images: Tensor,
    *,
    format: Format | None = None,
    raw_input: bool = False,
    safe_x86: bool = False,
    accuracy: Mapping[str, float] | None = None,
) -> Exported:
    """Write a frozen network as a file, load it where it will run, and keep it if it is equal.

    images: normalised [N, *input_shape], to compare on. format: by the path's suffix if None.
    raw_input: ONNX that takes uint8 pixels and normalises them itself. safe_x86: weights of 8
    bits become 7 where sums could overflow on x86 processors without VNNI. accuracy: top-1 in
    percent, by name, for the file's metadata.

    Raises UsageError for what the format cannot hold, GdfqError when the file is not equal; then
    nothing is written, and a file that was there stays. The path's folder is made.
    """
    format = _chosen(format, path)
    if raw_input and format != "onnx":
        raise UsageError(f"raw input is for ONNX files; the format is {format!r}. Leave it away.")
    make_folder(path.parent)
    network = copy.deepcopy(network).cpu().eval()
    if safe_x86:
        network = narrowed(network, layers_that_may_overflow(network))
    job = _Job(network, card, path, images.cpu(), raw_input, accuracy or {})
    kind = _KINDS[format]
    data = kind.write(job)

    def check(written: Path) -> tuple[Proof, Sequence[str]]:
        proof = kind.prove(job, written)
        return proof, kind.notes(job, data, proof)

    proof, notes = write_checked(path, data, check)
    return Exported(
        **vars(proof),
        path=path,
        format=format,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Job:
    """What is exported, and how."""

    network: fx.GraphModule
    card: Card
    path: Path
    images: Tensor
    raw_input: bool
    accuracy: Mapping[str, float]

    @property
    def risky(self) -> list[str]:
        return layers_that_may_overflow(self.network)

    def inputs(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Images as they come, and extreme ones: for the student, and for the file."""
        if not self.raw_input:
            beyond = BEYOND * self.images
            return (self.images, self.images), (beyond, beyond)
        preprocessing = self.card.preprocessing
        pixels = preprocessing.pixels(self.images)
        draw = stream(0, "export.pixels")
        extreme = torch.randint(256, pixels.shape, dtype=torch.uint8, generator=draw)
        black, white = (torch.full_like(extreme[:1], value) for value in (0, 255))
        extreme = torch.cat([black, white, extreme])
        return (preprocessing(pixels), pixels), (preprocessing(extreme), extreme)


@dataclass(frozen=True)
class _Kind:
    """How one format is written, proven equal, and described."""

    write: Callable[[_Job], bytes]
    prove: Callable[[_Job, Path], Proof]
    notes: Callable[[_Job, bytes, Proof], Sequence[str]]


def _chosen(format: Format | None, path: Path) -> Format:
    """The format that was asked for, or that of the path's suffix."""
    if path.is_dir():
        raise UsageError(f"an export is a file; {path} is a folder. Give the name of a file in it.")
    for known in FORMATS:
        if format == known or (format is None and path.suffix == f".{known}"):
            return known
    if format is not None:
        raise UsageError(f"the format must be one of {', '.join(FORMATS)}; got {format!r}.")
    raise UsageError(
        f"the name of an exported file must end with .{', .'.join(FORMATS)}; got {path.name!r}. "
        "Rename it or give the format."
    )


def _write_onnx(job: _Job) -> bytes:
    pixels = job.card.preprocessing if job.raw_input else None
    metadata = metadata_of(job.card, job.accuracy, safe=not job.risky)
    names = output_names(job.card)
    return to_onnx(job.network, job.card.input_shape, metadata, pixels, names)


def metadata_of(card: Card, accuracy: Mapping[str, float], *, safe: bool) -> dict[str, str]:
    """What an ONNX file says about itself.

    accuracy: top-1 in percent, by name; safe: whether no sum can overflow on x86 without VNNI.
    """

    def numbers(values: Sequence[float]) -> str:
        return ",".join(f"{value:.9g}" for value in values)

    return {
        "gdfq": card.gdfq_version,
        "bits": str(card.bits),
        "placement": card.placement,
        "keep": " ".join(card.keep),
        "recipe": card.recipe,
        "seed": str(card.seed),
        **({} if card.classes is None else {"classes": str(card.classes)}),
        "input_shape": "x".join(map(str, card.input_shape)),
        "mean": numbers(card.preprocessing.mean),
        "std": numbers(card.preprocessing.std),
        **{f"top1_{name}": f"{value:.4f}" for name, value in accuracy.items()},
        "x86_without_vnni": (
            "safe" if safe else f"may saturate: set {'='.join(PRECISE)}, or export with --safe-x86"
        ),
    }


def _prove_onnx(job: _Job, written: Path) -> Proof:
    """In the session that users get by default; where its sums saturate, in one without."""
    data = written.read_bytes()
    try:
        return _compare_onnx(job, data, precise=False)
    except GdfqError as error:
        if not job.risky:
            raise
        try:
            proof = _compare_onnx(job, data, precise=True)
        except GdfqError:
            raise GdfqError(
                f"{error} Or sums of 8-bit weights overflow on this processor: try --safe-x86."
            ) from error
        return replace(proof, saturates_here=True)


def _compare_onnx(job: _Job, data: bytes, *, precise: bool) -> Proof:
    run = onnx_runner(data, precise=precise)
    quantizers = [n for n in job.network.graph.nodes if operators.name_of(n) == _QUANTIZER]
    names = list(map(codes_name, quantizers))

    def compare(images: Tensor, fed: Tensor) -> tuple[Parity, list[CodesParity]]:
        outputs = output_names(job.card)
        found = onnx_values(data, [*names, *outputs], fed, precise=precise)
        codes, wanted = compare_codes(job.network, images, found)
        parity = _compared(job, run, images, fed, codes)
        got = [torch.from_numpy(found[name]) for name in outputs]
        error = Parity.of(wanted, got, classes=False).relative_error
        if not error <= FROM_EQUAL_CODES:
            raise GdfqError(
                "outputs must differ by the rounding of floats alone where codes are equal; those "
                f"of {job.path.name} are {error:.2%} off. It was not kept; report the network."
            )
        return parity, codes

    (inside, codes), (beyond, _) = (compare(*pair) for pair in job.inputs())
    differing = [(found.name, found.differ) for found in codes if found.differ]
    return Proof(inside, beyond, tuple(differing[:_NAMED]))


_QUANTIZER = "gdfq.fake_quantize"


@torch.no_grad()
def _compared(
    job: _Job, run: Run, images: Tensor, fed: Tensor, codes: Sequence[CodesParity] = ()
) -> Parity:
    """The parity on images; raises GdfqError when it is none, or when codes differ."""
    wanted = in_order(job.network(images))
    parity = Parity.of(wanted, run(fed), job.card.classes is not None)
    wrong = [found for found in codes if not found.only_rounded]
    if not wrong and is_equal(job.network, images, parity):
        return parity
    first = wrong or [found for found in codes if found.differ]
    named = ", ".join(f"{found.differ:.2%} of {found.name!r}" for found in first[:_NAMED])
    raise GdfqError(
        "an exported file must give the student's outputs, and its codes but for rounding; "
        f"{job.path.name} is {parity}."
        + (f" Codes that differ first, from equal inputs: {named}." if named else "")
        + " It was not kept; report the network."
    )


def _notes_onnx(job: _Job, data: bytes, proof: Proof) -> list[str]:
    notes = []
    if floats := _summary(computed_in_float(data)):
        notes.append(f"computed in float: {floats}")
    if proof.saturates_here:
        notes.append(
            f"ON THIS PROCESSOR 8-BIT SUMS SATURATE (no VNNI) in up to {len(job.risky)} layers, "
            "and answers are others than the student's: export with --safe-x86, or set the session "
            f"option {'='.join(PRECISE)}, with which the file is equal"
        )
    elif job.risky:
        notes.append(
            f"{len(job.risky)} layers may saturate on x86 processors without VNNI: --safe-x86 "
            f"avoids it, or the session option {'='.join(PRECISE)}"
        )
    return notes


def _summary(nodes: Sequence[tuple[str, str]]) -> str:
    """Layers by name, other operators by kind: `fc, 2 add, 1 silu`."""
    nodes = [(name, kind) for name, kind in nodes if not name.startswith(PIXELS)]
    layers = [name for name, kind in nodes if kind in _LAYERS]
    others = Counter(_COMMON.get(kind, kind.lower()) for _, kind in nodes if kind not in _LAYERS)
    return ", ".join([*layers, *(f"{count} {kind}" for kind, count in others.items())])


_LAYERS = frozenset({"Conv", "ConvTranspose", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm"}) | {
    "MatMul"
}
_COMMON = {"QuickGelu": "silu", "GlobalAveragePool": "average pool", "AveragePool": "average pool"}


def _prove(load: Callable[[bytes], Run], job: _Job, written: Path) -> Proof:
    run = load(written.read_bytes())
    inside, beyond = (_compared(job, run, *pair) for pair in job.inputs())
    return Proof(inside, beyond)


def _packed_runner(data: bytes) -> Run:
    loaded, _ = from_safetensors(data)
    return lambda images: in_order(loaded(images))


_KINDS: dict[Format, _Kind] = {
    "onnx": _Kind(_write_onnx, _prove_onnx, _notes_onnx),
    "pt2": _Kind(
        lambda job: to_program(job.network, job.card.input_shape),
        partial(_prove, program_runner),
        lambda *_: ["needs torch alone; weights take one byte a code"],
    ),
    "safetensors": _Kind(
        lambda job: to_safetensors(job.network, job.card),
        partial(_prove, _packed_runner),
        lambda _job, data, _proof: [
            f"{header_bytes(data)} of {len(data)} bytes are the header (graph and card)"
        ],
    ),
}
FORMATS: tuple[Format, ...] = tuple(_KINDS)
