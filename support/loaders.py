"""Every function that reads a file or a word from outside, with valid and mutated inputs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import click
import safetensors.torch
from support.mutations import (
    of_checkpoint,
    of_document,
    of_image,
    of_onnx,
    of_run,
    of_safetensors,
    of_sweep,
    of_text,
    of_zip,
    scramble,
)
from support.valid_files import (
    CLASS_NAMES,
    CLASSES,
    SHAPE,
    checkpoint,
    image_files,
    images_npz,
    network,
    onnx_file,
    run_files,
    student,
    tokens_npz,
    torch_files,
)
from torch import nn

from gdfq.api import load
from gdfq.cli.types import Numbers, Shape, Size
from gdfq.data.datasets import load_data
from gdfq.data.preprocessing import Preprocessing
from gdfq.data.tokens import load_tokens
from gdfq.data.vocabulary import Vocabulary
from gdfq.deploy import safetensors as packed
from gdfq.deploy.benchmark import size_of
from gdfq.deploy.onnx.session import onnx_calls
from gdfq.deploy.safetensors import STUDENT_FILE
from gdfq.errors import GdfqError, UsageError
from gdfq.execution.checkpoints import Checkpoints
from gdfq.files.states import name_of
from gdfq.functional.grid import Bits
from gdfq.generation.pipelines import Pipeline
from gdfq.generation.pool import PoolSettings, make_pool
from gdfq.models.loaded import Loaded
from gdfq.models.registry import load_model, load_weights_
from gdfq.recipes import find_recipe
from gdfq.report.compare import rows_of, side_by_side
from gdfq.report.read import read_run as read_for_report
from gdfq.runs.folder import RunFolder
from gdfq.runs.metrics import check_export
from gdfq.runs.sweep import read_sweep
from gdfq.student.scheme import LayerBits


def read_npz_(data: bytes, folder: Path) -> None:
    (folder / "data.npz").write_bytes(data)
    load_data(folder / "data.npz", SHAPE, CLASSES)


def read_tokens(data: bytes, folder: Path) -> None:
    (folder / "tokens.npz").write_bytes(data)
    load_tokens(folder / "tokens.npz", Vocabulary(40, 32, 1))


def read_images(data: bytes, folder: Path) -> None:
    (folder / "a").mkdir(exist_ok=True)
    (folder / "a" / "x.png").write_bytes(data)
    load_data(folder, SHAPE, None)


def read_weights(suffix: str) -> Callable[[bytes, Path], None]:
    model = network()

    def read(data: bytes, folder: Path) -> None:
        (folder / f"w{suffix}").write_bytes(data)
        load_weights_(model, folder / f"w{suffix}")

    return read


def read_student(data: bytes, folder: Path) -> None:
    (folder / STUDENT_FILE).write_bytes(data)
    packed.read(folder / STUDENT_FILE)


def read_run(data: bytes, folder: Path) -> None:
    (folder / ".lock").unlink(missing_ok=True)
    for name, content in RUN.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
    changed, _, content = data.partition(b"\n")
    path = folder / changed.decode()
    path.unlink()
    if content:
        path.write_bytes(content)
    else:
        path.symlink_to("/etc/passwd")
    errors = []
    rows, notes = rows_of([read_for_report(folder)])
    assert side_by_side(rows).rows or notes
    for reads in (RunFolder, check_export, load):
        try:
            reads(folder)
        except GdfqError as error:
            errors.append(error)
    if len(errors) == 3:
        raise errors[-1]


def read_checkpoint(data: bytes, folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / f"checkpoint-000001-{name_of(data)}.safetensors").write_bytes(data)
    checkpointer = Checkpoints(folder)
    checkpointer.begin({"seed": 0}, {"torch": "2"})
    checkpointer.register("student", network())
    checkpointer.save()


def read_onnx(data: bytes, folder: Path) -> None:
    (folder / "b.bin").write_bytes(bytes(16))
    (folder / "m.onnx").write_bytes(data)
    size_of(folder / "m.onnx")
    onnx_calls(folder / "m.onnx", 1)([(1, *SHAPE)])()


def read_text(data: bytes, _: Path) -> None:
    text = data.decode(errors="replace")
    calls: list[Callable[[], object]] = [
        lambda: Bits.parse(text),
        lambda: LayerBits.parse(text),
        lambda: find_recipe(text),
        lambda: Loaded(nn.Identity()).input(Shape().convert(text, None, None), (0.5,), None),
        lambda: Preprocessing.of(1, Numbers().convert(text, None, None), None),
        lambda: Size().convert(text, None, None),
    ]
    if ":" not in text:  # those run code, as they should
        calls.append(lambda: load_model(text))
    accepted = 0
    for call in calls:
        try:
            call()
            accepted += 1
        except (GdfqError, click.BadParameter):
            pass
    if not accepted:
        raise UsageError("it is none of them")


def read_sweep_(data: bytes, folder: Path) -> None:
    (folder / "sweep.yaml").write_bytes(data)
    read_sweep(folder / "sweep.yaml").cells()


SETTINGS = PoolSettings("diffusers:tiny", ("cat", "dog"))


def _no_pipeline() -> Pipeline:
    raise AssertionError("no image is missing")


def read_generated(data: bytes, folder: Path) -> None:
    (folder / "generated.json").write_bytes(data)
    make_pool(folder, SETTINGS, 0, _no_pipeline)


WORDS = [
    b"w4a8",
    b"stage1.*=float",
    b"last=8",
    b"fast",
    b"3x32x32",
    b"0.5,0.5,0.5",
    b"1.5MiB",
    b"net.onnx",
]
SWEEPS = [
    b"networks: [net.onnx, timm:resnet18]\nbits: [w4a4, w8a8]\nseeds: [0, 1, 2]\nsteps: 100\n",
    b"""networks:
  - model: file.py:net
    name: mine
    input: [3, 32, 32]
    mean: 0.5
    classifier: false
    size: 300KB
recipes: [fast, round]
bits: auto
placement: [full, t1]
keep: [[], ["last=8", "stem.*=float"]]
""",
]
RUN = run_files()


@dataclass(frozen=True)
class Loader:
    """A function that reads files, valid files, their mutation, and its share of all inputs in percent."""

    read: Callable[[bytes, Path], None]
    valid: Sequence[bytes]
    change: Callable[[bytes, Random], bytes]
    share: int


LOADERS = {
    "npz": Loader(read_npz_, [images_npz()], of_zip, 11),
    "tokens": Loader(read_tokens, [tokens_npz()], of_zip, 3),
    "image folder": Loader(read_images, image_files(), of_image, 14),
    "generated images": Loader(
        read_generated, [json.dumps(SETTINGS.as_values()).encode()], of_sweep, 1
    ),
    "weights, safetensors": Loader(
        read_weights(".safetensors"),
        [safetensors.torch.save(network().state_dict())],
        of_safetensors,
        12,
    ),
    "weights, torch": Loader(read_weights(".pt"), torch_files(legacy=False), of_zip, 11),
    "weights, torch before 1.6": Loader(
        read_weights(".pth"), torch_files(legacy=True), scramble, 11
    ),
    "quantized network": Loader(read_student, [student()], of_safetensors, 12),
    "quantized network, signed": Loader(
        read_student, [student(), student(CLASS_NAMES)], of_document, 4
    ),
    "run folder": Loader(
        read_run, [json.dumps({name: data.hex() for name, data in RUN.items()}).encode()], of_run, 3
    ),
    "checkpoint": Loader(read_checkpoint, [checkpoint()], of_checkpoint, 4),
    "ONNX": Loader(read_onnx, [onnx_file()], of_onnx, 6),
    "options": Loader(read_text, WORDS, of_text, 5),
    "sweep": Loader(read_sweep_, SWEEPS, of_sweep, 3),
}
