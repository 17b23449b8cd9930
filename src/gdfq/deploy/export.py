"""Export: a file is kept only if its runtime reproduces the student's outputs."""

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gdfq.deploy.card import Card
from gdfq.deploy.compressed_tensors.target import COMPRESSED_TENSORS
from gdfq.deploy.executorch.target import EXECUTORCH
from gdfq.deploy.litert.target import LITERT
from gdfq.deploy.litert_micro.target import LITERT_MICRO
from gdfq.deploy.onnx.devices import QNN, TENSORRT
from gdfq.deploy.onnx.floats import ONNX_FP8
from gdfq.deploy.onnx.target import ONNX, ONNX_COMPAT
from gdfq.deploy.openvino.target import OPENVINO
from gdfq.deploy.runtimes import Run, program_runner
from gdfq.deploy.safetensors import from_safetensors, to_safetensors
from gdfq.deploy.saturation import without_overflow
from gdfq.deploy.target import Carrier, Job, Proof, Runtime, Target, prove_by
from gdfq.deploy.torch_calls import program_calls
from gdfq.deploy.torch_export import to_program
from gdfq.errors import UsageError
from gdfq.execution.budget import MemoryBudget
from gdfq.files.atomic import make_folder, write_atomically, write_checked
from gdfq.files.untrusted import header_bytes
from gdfq.functional.float_grid import ALL_FORMATS
from gdfq.graph.ends import NO_ENDS, output_names
from gdfq.graph.inputs import image_shape
from gdfq.graph.memory import training_bytes
from gdfq.student.integer_network import IntegerNetwork
from gdfq.student.scheme import PLACEMENTS


def _packed_runner(data: bytes) -> Run:
    network, _ = from_safetensors(data)
    return network.outputs


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        ONNX,
        LITERT,
        Target(
            "pt2",
            ".pt2",
            "runs in PyTorch without gdfq",
            lambda job: to_program(job.network, job.card.inputs),
            prove_by(program_runner),
            lambda *_: ["needs only torch; weights take one byte per code"],
            runtime=Runtime("PyTorch", "torch", calls=program_calls),
            loads_code=True,
            weights=Carrier("int8 or uint8", formats=ALL_FORMATS),
            activations=Carrier("float of whole numbers", formats=ALL_FORMATS),
        ),
        Target(
            "safetensors",
            ".safetensors",
            "smallest; gdfq.load reads it",
            lambda job: to_safetensors(job.network, job.card),
            prove_by(_packed_runner),
            lambda _job, data, _proof: [
                f"{header_bytes(data)} of {len(data)} bytes are the header (graph and card)"
            ],
            runtime=Runtime("gdfq", "gdfq"),
            placements=PLACEMENTS,
            weights=Carrier("packed at their true bits", formats=ALL_FORMATS),
            activations=Carrier("float of whole numbers", formats=ALL_FORMATS),
        ),
        ONNX_COMPAT,
        ONNX_FP8,
        OPENVINO,
        LITERT_MICRO,
        EXECUTORCH,
        TENSORRT,
        QNN,
        COMPRESSED_TENSORS,
    )
}
"""The targets by name."""
OTHER_NAMES: Mapping[str, str] = {"onnxruntime": "onnx", "web": "onnx"}
"""Further names of targets, each with the name that results use."""


@dataclass(frozen=True)
class Exported(Proof):
    """A written file, and its parity with the student."""

    path: Path = field(kw_only=True)
    target: str = field(kw_only=True)
    """The target's name."""
    bytes: int = field(kw_only=True)
    sha256: str = field(kw_only=True)
    notes: tuple[str, ...] = field(kw_only=True)

    def as_values(self) -> dict[str, object]:
        """Return the fields as plain values, for JSON."""
        return {**asdict(self), "path": self.path.name}


_MAX_NUMBERS = 2**21
"""Of the examples that a file is compared on (13 of 3x224x224): more take long and tell no more."""


def export(
    network: IntegerNetwork,
    card: Card,
    path: Path,
    examples: tuple[Tensor, ...],
    *,
    names: Sequence[str] = (),
    target: str | Target | None = None,
    raw_input: bool = False,
    safe_x86: bool = False,
    accuracy: Mapping[str, float] | None = None,
    memory: MemoryBudget = MemoryBudget(),
    original: str | None = None,
) -> Exported:
    """Write an integer network as a file, and keep it if its runtime gives equal outputs.

    Args:
        network: The integer network.
        card: Its card.
        path: The file, or the folder of a target that writes one; folders are created.
        examples: A tensor [n, *shape] for each input of the network, to compare on. If images are
            large, only the first are used.
        names: Names of the outputs; by default those of a network without a softmax.
        target: The kind of file: a name in `TARGETS` or a `Target`. By the suffix if None.
        raw_input: A file that takes uint8 pixels and normalises them itself.
        safe_x86: Weights of 8 bits become 7 where sums could overflow on x86 processors without
            VNNI.
        accuracy: Top-1 in percent, by name, for the file's metadata.
        memory: Budget for the comparison, which holds all activations of its examples; only as
            many examples are used as fit.
        original: The model that the network was made from, as `hf:ID`, for a target that writes
            weights for its code.

    Raises:
        UsageError: The target cannot hold the network.
        GdfqError: The outputs differ. Nothing is written; an existing file is kept.
    """
    kind = find_target(target, path)
    if raw_input:
        _check_option("raw input", kind, lambda target: target.raw_input)
    if safe_x86:
        _check_option("safe x86", kind, lambda target: target.may_saturate)
    if raw_input:
        image_shape(card.inputs, needs="raw input needs", advice="Remove raw_input.")
    file = kind.file_at(path)
    network = copy.deepcopy(network).cpu().eval()
    if safe_x86:
        network = without_overflow(network)
    kind.check_network(network, card.placement)
    kind.require_runtime()
    make_folder(file.parent)
    numbers = sum(math.prod(example.shape[1:]) for example in examples)
    fits = memory.images(training_bytes(network.graph), torch.device("cpu"))
    count = min(fits, max(1, _MAX_NUMBERS // numbers))
    inputs = tuple(example[:count].cpu() for example in examples)
    names = tuple(names or output_names(card, NO_ENDS))
    job = Job(network, card, file, inputs, raw_input, accuracy or {}, names, original)
    data = kind.write(job)

    beside: dict[Path, bytes] = {}

    def check(written: Path) -> tuple[Proof, Sequence[str]]:
        proof = kind.prove(job, written)
        for suffix, contents in kind.beside(job, data).items():
            beside[kind.path_beside(file, suffix)] = contents
        unproven = [kind.unproven] if kind.unproven else []
        written_beside = [f"with {other.name} beside it" for other in beside]
        remarks = kind.notes(job, data, proof)
        return proof, [*unproven, *remarks, *written_beside, *_oldest_version(kind, network)]

    proof, notes = write_checked(file, data, check)
    for other, contents in beside.items():
        write_atomically(other, contents)
    return Exported(
        **vars(proof),
        path=path,
        target=kind.name,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        notes=tuple(notes),
    )


def _oldest_version(kind: Target, network: IntegerNetwork) -> list[str]:
    """Return a note that says which version of its runtime a file needs, if that is known."""
    oldest = None if kind.runtime is None else kind.runtime.oldest_for(network)
    if kind.runtime is None or oldest is None:
        return []
    return [f"needs {kind.runtime.name} {oldest} or newer"]


def _check_option(option: str, kind: Target, takes: Callable[[Target], bool]) -> None:
    """Raise UsageError if a target does not take an option, with the names of those that do."""
    if not takes(kind):
        names = ", ".join(target.name for target in TARGETS.values() if takes(target))
        raise UsageError(
            f"{option} is for the targets {names}; the target is {kind.name!r}. "
            f"Remove {option.replace(' ', '_')}."
        )


def named_target(target: str | Target) -> Target:
    """Return a target by its name; a target stays as it is.

    Raises:
        UsageError: There is no target of this name.
    """
    if isinstance(target, Target):
        return target
    name = OTHER_NAMES.get(target, target)
    if name not in TARGETS:
        names = ", ".join((*TARGETS, *OTHER_NAMES))
        raise UsageError(f"the target must be one of {names}; got {target!r}. See `gdfq targets`.")
    return TARGETS[name]


def find_target(target: str | Target | None, path: Path) -> Target:
    """Return the given target, or the one whose suffix is the longest that ends the path.

    Args:
        target: A target, a name in `TARGETS`, or None for that of the suffix.
        path: The file to write.

    Raises:
        UsageError: There is no such target, the path is a folder, or it has the suffix of a file of
            another kind.
    """
    named = None if target is None else named_target(target)
    if path.is_dir() and (named is None or not named.file_in_folder):
        raise UsageError(f"an export is a file; {path} is a folder. Give the name of a file in it.")
    if named is not None:
        _check_suffix(named, path)
        return named
    fitting = [known for known in TARGETS.values() if path.name.endswith(known.suffix)]
    if fitting:
        return max(fitting, key=lambda known: len(known.suffix))
    suffixes = ", ".join(known.suffix for known in TARGETS.values())
    raise UsageError(
        f"the name of an exported file must end with {suffixes}; got {path.name!r}. "
        "Rename it or give the target."
    )


def _check_suffix(target: Target, path: Path) -> None:
    """Raise UsageError for a file of a target with the suffix of another kind of file."""
    own, found = Path(f"x{target.suffix}").suffix, path.suffix
    kinds = {Path(known.file_name).suffix for known in TARGETS.values()}
    if found != own and found in kinds - {""}:
        raise UsageError(
            f"the name of a file of target {target.name!r} must not end as those of another; got "
            f"{path.name!r}. Name it {path.with_suffix(own).name!r}, or give the target of {found}."
        )
