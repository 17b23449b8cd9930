"""Export: a file is kept only when its own runtime gives what the student gives."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx

from gdfq import grid, operators
from gdfq.artifacts.onnx import codes_name, to_onnx
from gdfq.artifacts.packed import from_safetensors, header_bytes, to_safetensors
from gdfq.artifacts.program import to_program
from gdfq.capture import tensors_of
from gdfq.card import Card
from gdfq.errors import GdfqError, UsageError
from gdfq.files import write_atomically
from gdfq.freeze import narrowed
from gdfq.grid import code_bounds
from gdfq.outputs import in_order, output_names
from gdfq.runtimes import Run, onnx_runner, onnx_values, program_runner

Format = Literal["onnx", "pt2", "safetensors"]
FORMATS: tuple[Format, ...] = ("onnx", "pt2", "safetensors")

BEYOND = 3.0
"""Images are also compared at this multiple, where activations must saturate alike."""
TOLERANCE, TOLERANCE_OVERALL = 0.05, 0.25
"""Relative errors of the logits that always pass: half of the images', and overall.

Sums in another order round some activations the other way, which moves the logits of some images
by a few percent; a lost clamp moves those of all (by 20 to 60 % where it was measured). Networks
that are more sensitive are measured against themselves: see `_checked`.
"""
_ROUNDED_SHARE, _ROUNDED = 0.01, 4
"""More codes than these, in share and in number, do not differ by rounding (1e-5 is usual)."""
_NAMED = 3
"""Activations that are named when codes differ."""
_TINY = 1e-12
_SAFE_PRODUCT = 2**15 - 1
"""What two neighbouring products may add up to in 16 bits, on processors without VNNI."""


@dataclass(frozen=True)
class Parity:
    """How near a runtime comes to the student on some images.

    Of several outputs the worst counts.
    """

    images: int
    max_difference: float
    """Of a number in an output."""
    relative_error: float
    """‖z − y‖ / ‖y‖ over all numbers of an output y of the student and z of the runtime."""
    typical_error: float
    """The median over the images of the same."""
    agreement: float | None
    """Images with the same highest logit, in percent; None where outputs are not classes."""

    def within(self, typical: float, overall: float) -> bool:
        """Whether both errors are at most as given; NaN is not."""
        return self.typical_error <= typical and self.relative_error <= overall

    @classmethod
    def of(cls, wanted: Sequence[Tensor], got: Sequence[Tensor], classes: bool) -> "Parity":
        """Compare outputs [N, ...] of the student and of the runtime."""
        differences, overall, typical = [], [], []
        for theirs, ours in zip(wanted, got, strict=True):
            theirs = theirs.double().flatten(1)
            distance = ours.double().flatten(1) - theirs
            differences.append(float(distance.abs().max()))
            overall.append(float(distance.norm() / theirs.norm().clamp_min(_TINY)))
            by_image = distance.norm(dim=1) / theirs.norm(dim=1).clamp_min(_TINY)
            typical.append(float(by_image.median()))
        agreement = None
        if classes:
            agreement = 100 * float((got[0].argmax(1) == wanted[0].argmax(1)).double().mean())
        return cls(len(wanted[0]), max(differences), max(overall), max(typical), agreement)


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares with the student."""

    path: Path
    format: Format
    bytes: int
    inside: Parity
    """On images as they come."""
    beyond: Parity | None
    """On images three times as large; None for a file that takes pixels."""
    differs_first: tuple[tuple[str, float], ...] = ()
    """ONNX: the first activations of which some codes differ, and the share that does."""
    notes: tuple[str, ...] = ()

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
    nothing is written, and a file that was there stays.
    """
    format = format or _format_of(path)
    if path.is_dir():
        raise UsageError(f"an export is a file; {path} is a folder. Give the name of a file in it.")
    if raw_input and format != "onnx":
        raise UsageError(f"raw input is for ONNX files; the format is {format!r}. Leave it away.")
    network = copy.deepcopy(network).cpu().eval()
    images = images.cpu()
    risky = layers_that_may_overflow(network)
    if safe_x86:
        network, risky = narrowed(network, risky), []
    preprocessing = card.preprocessing
    if format == "onnx":
        metadata = metadata_of(card, accuracy or {}, safe=not risky)
        pixels = preprocessing if raw_input else None
        data = to_onnx(network, card.input_shape, metadata, pixels, output_names(card))
    elif format == "pt2":
        data = to_program(network, card.input_shape)
    else:
        data = to_safetensors(network, card)

    differs: tuple[tuple[str, float], ...] = ()

    def check(written: Path) -> tuple[Parity, Parity | None]:
        nonlocal differs
        run = _runner(format, written.read_bytes())
        checked = partial(_checked, path, network, run, card.classes is not None)
        if raw_input:
            pixels = preprocessing.pixels(images)
            return checked(preprocessing(pixels), pixels), None
        if format == "onnx":
            _check_codes(path, network, data, BEYOND * images)
            differs = _check_codes(path, network, data, images)
        return checked(images, images), checked(BEYOND * images, BEYOND * images)

    parities: list[tuple[Parity, Parity | None]] = []
    write_atomically(path, data, check=lambda written: parities.append(check(written)))
    ((inside, beyond),) = parities
    notes = _notes(format, data, network, risky)
    return Exported(path, format, len(data), inside, beyond, differs, notes)


def _format_of(path: Path) -> Format:
    for format in FORMATS:
        if path.suffix == f".{format}":
            return format
    raise UsageError(
        f"the name of an exported file must end with .{', .'.join(FORMATS)}; got {path.name!r}. "
        "Rename it or give the format."
    )


def _runner(format: Format, data: bytes) -> Run:
    if format == "onnx":
        return onnx_runner(data)
    if format == "pt2":
        return program_runner(data)
    loaded, _ = from_safetensors(data)
    return lambda images: in_order(loaded(images))


@torch.no_grad()
def _checked(
    path: Path, network: fx.GraphModule, run: Run, classes: bool, images: Tensor, fed: Tensor
) -> Parity:
    """The parity on images; raises GdfqError when it is none."""
    wanted = in_order(network(images))
    parity = Parity.of(wanted, run(fed), classes)
    if parity.within(TOLERANCE, TOLERANCE_OVERALL):
        return parity
    # How far the student is from itself in double precision is what rounding alone can do.
    exact = in_order(copy.deepcopy(network).double()(images.double()))
    sensitivity = Parity.of(wanted, exact, classes)
    typical = max(TOLERANCE, 2 * sensitivity.typical_error)
    overall = max(TOLERANCE_OVERALL, 2 * sensitivity.relative_error)
    if not parity.within(typical, overall):
        raise GdfqError(
            f"an exported file must give the student's outputs, within {typical:.0%} for most "
            f"images and {overall:.0%} overall; {path.name} is {parity.typical_error:.2%} and "
            f"{parity.relative_error:.2%} off on {parity.images} images. "
            "It was not kept; report the network."
        )
    return parity


@torch.no_grad()
def _check_codes(
    path: Path, network: fx.GraphModule, data: bytes, images: Tensor
) -> tuple[tuple[str, float], ...]:
    """The first activations whose codes differ in ONNX Runtime, with the share that does.

    Raises GdfqError when it is more than rounding: the first that differs has equal inputs.
    """
    values: dict[str, Tensor] = {}

    class Look(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            if operators.name_of(n) == "gdfq.fake_quantize":
                (x, scale, zero_point, bits), _ = self.fetch_args_kwargs_from_env(n)
                codes = grid.quantize(x, scale, zero_point, bits) - code_bounds(bits)[0]
                values[codes_name(n)] = codes
            return super().run_node(n)

    Look(network).run(images)
    found = onnx_values(data, list(values), images)
    wrong = {
        name: values[name].numpy() != codes.reshape(values[name].shape)
        for name, codes in found.items()
    }
    differing = [(name, float(mask.mean())) for name, mask in wrong.items() if mask.any()]
    if differing:
        name, share = differing[0]
        if share > _ROUNDED_SHARE and wrong[name].sum() > _ROUNDED:
            raise GdfqError(
                f"a runtime may round a few codes otherwise; of {name!r} in {path.name} "
                f"{share:.2%} differ, from equal inputs. It was not kept; report the network."
            )
    return tuple(differing[:_NAMED])


def layers_that_may_overflow(network: fx.GraphModule) -> list[str]:
    """Layers whose kernels may saturate on x86 processors without VNNI, by their codes' names.

    Those add two products of unsigned activations and signed weights in 16 bits.
    """
    tensors = tensors_of(network)
    found = []
    for node in network.graph.nodes:
        quantizer = activation_of(node)
        if quantizer is None:
            continue
        codes, _, zero_point, _ = _arguments(_arguments(node)[1])
        bits = _arguments(quantizer)[3]
        reach = (tensors[codes.target].float() - tensors[zero_point.target]).abs().max()
        if 2 * (2**bits - 1) * float(reach) > _SAFE_PRODUCT:
            found.append(str(codes.target))
    return found


def activation_of(node: fx.Node) -> fx.Node | None:
    """The quantizer whose codes a layer multiplies by its weights' codes, or None."""
    if operators.name_of(node) not in operators.WEIGHTED:
        return None
    x, weight, *_ = _arguments(node)
    if operators.name_of(weight) != "gdfq.dequantize":
        return None
    source = operators.grid_source(x)
    return source if operators.name_of(source) == "gdfq.fake_quantize" else None


def float_layers(network: fx.GraphModule) -> list[str]:
    """Layers that a runtime must compute in float: what enters or leaves them is on no grid."""
    return [
        _layer_name(node)
        for node in network.graph.nodes
        if operators.name_of(node) in operators.WEIGHTED
        and not (activation_of(node) is not None and _has_integer_kernel(node))
    ]


def _layer_name(layer: fx.Node) -> str:
    weight = _arguments(layer)[1]
    if operators.name_of(weight) != "gdfq.dequantize":
        return operators.layer_name(layer)
    return str(_arguments(weight)[0].target).rpartition(".")[0].partition(".")[2]


def _has_integer_kernel(layer: fx.Node) -> bool:
    transposed = operators.name_of(layer) in operators.TRANSPOSED_CONVOLUTIONS
    return not transposed and all(map(_ends_on_grid, layer.users))


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _ends_on_grid(user: fx.Node) -> bool:
    """Whether a layer's user quantizes its output, perhaps behind a ReLU; or is the network's."""
    if operators.is_rectifier(user) or operators.keeps_grid(user):
        return all(map(_ends_on_grid, user.users))
    return user.op == "output" or operators.name_of(user) == "gdfq.fake_quantize"


def metadata_of(card: Card, accuracy: Mapping[str, float], *, safe: bool) -> dict[str, str]:
    """What an ONNX file says about itself.

    accuracy: top-1 in percent, by name; safe: whether no sum can overflow on x86 without VNNI.
    """

    def numbers(values: Sequence[float]) -> str:
        return ",".join(f"{value:g}" for value in values)

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
        "x86_without_vnni": "safe" if safe else "may saturate: export with --safe-x86",
    }


def _notes(
    format: Format, data: bytes, network: fx.GraphModule, risky: Sequence[str]
) -> tuple[str, ...]:
    if format == "safetensors":
        return (f"{header_bytes(data)} of {len(data)} bytes are the header (graph and card)",)
    if format == "pt2":
        return ("needs torch alone; weights take one byte a code",)
    notes = []
    if floats := float_layers(network):
        notes.append(f"computed in float: {', '.join(floats)}")
    if risky:
        notes.append(
            f"{len(risky)} layers may saturate on x86 processors without VNNI: --safe-x86 avoids it"
        )
    return tuple(notes)
