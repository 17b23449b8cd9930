"""Fuzzing: every loader reads 100,000 mutated files in all, and refuses them in the documented way.

    python benchmarks/fuzz.py                           # all, some minutes on one core
    python benchmarks/fuzz.py --only npz --index 4711   # one input again

Inputs are bit flips, cuts and splices of valid files, edits of their headers with valid lengths and
checksums, and of their JSON as a tree. Input i of a loader depends on --seed and i alone; a run that
was stopped goes on. Loaders run in child processes under a limit of memory. Failures are: any exception
but GdfqError, a death of the process, more than 20 seconds of a core, more than 512 MiB, memory that was
asked for in vain, and what the interpreter's audit hears: files opened outside the folder of the test,
processes, sockets. Results: benchmarks/results/fuzz.json; the exit code is 1 when there are failures.
"""

import argparse
import base64
import copy
import io
import json
import math
import mmap
import os
import resource
import signal
import struct
import sys
import sysconfig
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import safetensors.torch
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import fx, nn

from gdfq import operators
from gdfq.artifacts import packed
from gdfq.artifacts.packed import STUDENT_FILE
from gdfq.bench import side_by_side, size_of
from gdfq.capture import flat_module
from gdfq.card import Card
from gdfq.checkpoints import Checkpoints
from gdfq.cli import _Numbers, _Shape, _Size
from gdfq.data import Preprocessing, load_data
from gdfq.errors import GdfqError, UsageError
from gdfq.files import write_json
from gdfq.grid import Bits
from gdfq.models import load_model, load_weights_
from gdfq.models.loaded import Loaded
from gdfq.quantized import load
from gdfq.recipes import find_recipe
from gdfq.runs import CONFIG, EXAMPLES, EXPORT, METRICS, ONNX_FILE, RunFolder, check_export
from gdfq.states import name_of, to_bytes
from gdfq.student import Keep

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
SHAPE, CLASSES = (3, 8, 8), 5
MEMORY, ROOM, SECONDS, CHUNK = 512, 6144, 20, 2000
"""MiB that one input may add, MiB of address space (Python's files reserve what a length of 32 bits
asks for, and do not touch it), seconds of a core, and inputs that one child process reads."""


# --- valid files


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, CLASSES)
    )


def student() -> bytes:
    """A small frozen network, written by hand."""
    graph = fx.Graph()
    tensors = {
        "x.scale": torch.tensor(0.1),
        "x.zero_point": torch.tensor(0.0),
        "conv.codes": torch.arange(4 * 3 * 9, dtype=torch.int8)
        .remainder(16)
        .sub(8)
        .view(4, 3, 3, 3),
        "conv.scale": torch.full((4, 1, 1, 1), 0.02),
        "conv.zero_point": torch.zeros(4, 1, 1, 1),
        "fc.weight": torch.linspace(-1, 1, 4 * CLASSES).view(CLASSES, 4),
    }
    x = graph.placeholder("images")
    stored = {name: graph.get_attr(name) for name in tensors}

    def call(name: str, *args: Any) -> fx.Node:
        return graph.call_function(operators.resolve(name), args)

    x = call("gdfq.fake_quantize", x, stored["x.scale"], stored["x.zero_point"], 8)
    weight = [stored[f"conv.{name}"] for name in ("codes", "scale", "zero_point")]
    x = call("aten.conv2d.default", x, call("gdfq.dequantize", *weight, 4), None, [1, 1], [1, 1])
    x = call("aten.mean.dim", call("aten.relu.default", x), [2, 3])
    graph.output(call("aten.linear.default", x, stored["fc.weight"]))
    preprocessing = Preprocessing.of(3, [0.5] * 3, [0.2] * 3)
    card = Card(SHAPE, CLASSES, 0, preprocessing, Bits(4, 8), "full", "fast", 0)
    return packed.to_safetensors(flat_module(graph, tensors), card)


def checkpoint() -> bytes:
    parts = {"student": network().state_dict(), "order": {"left": torch.arange(5), "epoch": 1}}
    state = {"settings": {"seed": 0}, "around": {"torch": "2"}, "parts": parts}
    return to_bytes(state, lambda _: "")


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def images_npz() -> bytes:
    draw = np.random.default_rng(0)
    return npz(images=draw.integers(0, 256, (6, *SHAPE), np.uint8), labels=np.arange(6) % CLASSES)


def image_files() -> list[bytes]:
    draw = np.random.default_rng(0)
    found = []
    for kind in ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM"):
        for mode, channels in (("RGB", (3,)), ("L", ())):
            buffer = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (9, 12, *channels), np.uint8), mode).save(
                buffer, kind
            )
            found.append(buffer.getvalue())
    return found


class Trap:
    """Pickled code."""

    def __reduce__(self) -> Any:
        return os.system, ("touch trap",)


def torch_files(legacy: bool) -> list[bytes]:
    found = []
    state = network().state_dict()
    for value in (state, {"state_dict": state}, {**state, "trap": Trap()}):
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
        found.append(buffer.getvalue())
    return found


def onnx_file() -> bytes:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3, 4], range(12))
    outside = TensorProto(name="b", data_type=TensorProto.FLOAT, dims=[4])
    outside.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "b.bin"), ("offset", "0"), ("length", "16")):
        entry = outside.external_data.add()
        entry.key, entry.value = key, value
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"], axis=1),
        helper.make_node("Gemm", ["f", "w", "b"], ["y"]),
    ]
    ends = (("x", ["N", *SHAPE]), ("y", ["N", 4]))
    first, last = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in ends)
    graph = helper.make_graph(nodes, "g", [first], [last], [weight, outside])
    opset = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


# --- mutations

NUMBERS = (0, 1, 127, 128, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)
TEXTS = ("", "..", "../../etc/passwd", "/dev/zero", "<script>alert(1)</script>", "\u202e\U0001f600",
         "\x00", "__class__", "forward", "os.system", "import os", "a" * 5000, "nan", "aten.zeros.default",
         "float64", "w4a4", "import", "%s%n")  # fmt: skip
NAMES = tuple(text for text in TEXTS if text.strip("\0"))
"""Of files, which end at a null."""
VALUES: tuple[Any, ...] = (None, True, -1, 0, 1, 3, 2**31, 2**63, 10**400, -1.5, 1e308, math.inf, math.nan,
                           [], {}, [[]], [10**9] * 4, {"node": "x"}, {"float": "nan"})  # fmt: skip


def scramble(data: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """A few blows to bytes that know nothing of what they are."""
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        at, length = random.randrange(len(data) + 1), random.choice((1, 2, 4, 8, 64, 1024))
        kind = random.randrange(8)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << random.randrange(8)
        elif kind == 1:
            data[at : at + length] = random.randbytes(length)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length] * random.choice((1, 2, 100))
        elif kind == 5:
            other = random.choice(others or (bytes(data),))
            data[at:] = other[random.randrange(len(other) + 1) :]
        elif kind == 6:
            width, order = random.choice((2, 4, 8)), random.choice(("little", "big"))
            number = random.choice(NUMBERS) % 2 ** (8 * width)
            data[at : at + width] = number.to_bytes(width, order)
        else:
            data[at : at + length] = bytes([random.choice((0, 255, 48, 125))]) * length
    return bytes(data)


def edited(tree: Any, random: Random) -> Any:
    """A JSON value with one place changed: another value, none, twice, under another name."""
    places = list(_places(tree))
    if not places:
        return copy.deepcopy(random.choice(VALUES))
    holder, key = random.choice(places)
    kind = random.randrange(7)
    if kind == 0:
        holder[key] = copy.deepcopy(random.choice(VALUES))
    elif kind == 1:
        holder[key] = random.choice(TEXTS)
    elif kind == 2:
        del holder[key]
    elif kind == 3:
        other, where = random.choice(places)
        holder[key] = json.loads(json.dumps(other[where]))
    elif kind == 4 and isinstance(holder, dict):
        holder[random.choice(TEXTS)] = holder.pop(key)
    elif kind == 5 and isinstance(holder[key], int | float):
        holder[key] = random.choice((-holder[key], holder[key] * 10**6, holder[key] + 1, *NUMBERS))
    else:
        value: Any = holder[key]
        for _ in range(random.choice((1, 20, 200))):
            value = [value] if random.random() < 0.5 else {"a": value}
        holder[key] = value
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


def json_text(tree: Any, random: Random) -> bytes:
    for _ in range(random.choice((1, 1, 3))):
        tree = edited(tree, random)
    text = json.dumps(tree)
    if random.random() < 0.02:
        text = "[" * 10**5
    elif random.random() < 0.02 and text.startswith("{"):
        text = '{"gdfq":1,"gdfq":[],' + text[1:]
    return text.encode(errors="surrogatepass")


def of_safetensors(data: bytes, random: Random) -> bytes:
    """Blows, or a header edited as JSON whose length is right."""
    if random.random() < 0.5:
        return scramble(data, random)
    length = int.from_bytes(data[:8], "little")
    header = json_text(json.loads(data[8 : 8 + length]), random)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def of_checkpoint(data: bytes, random: Random) -> bytes:
    """Blows, or a checkpoint whose tree was edited; its name has its hash either way."""
    if random.random() < 0.3:
        return of_safetensors(data, random)
    length = int.from_bytes(data[:8], "little")
    tree = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["gdfq-state"])
    text = json_text(tree, random).decode()
    return safetensors.torch.save(safetensors.torch.load(data), {"gdfq-state": text})


def of_document(data: bytes, random: Random) -> bytes:
    """A student whose document was edited and signed again."""
    length = int.from_bytes(data[:8], "little")
    document = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["gdfq"])
    tensors = safetensors.torch.load(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        part = random.choice(("card", "codes", "graph", "graph"))
        document[part] = edited(document[part], random)
    try:
        document["sha256"] = packed.digest(document, tensors)
        text = json.dumps(document, separators=(",", ":"))
        return safetensors.torch.save(tensors, {"gdfq": text})
    except Exception:  # what cannot even be written
        return scramble(data, random)


def of_zip(data: bytes, random: Random) -> bytes:
    """Blows, or members that are changed inside, left out or doubled in a valid archive."""
    if random.random() < 0.4:
        return scramble(data, random)
    buffer = io.BytesIO()
    kind = random.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
    )
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", kind) as new:
        for info in old.infolist():
            content = old.read(info)
            if random.random() < 0.5:
                head = random.choice((64, 128, len(content)))  # most is decided at the beginning
                content = scramble(content[:head], random) + content[head:]
            if random.random() < 0.1:
                content = _npy_header(content, random)
            name = random.choice(NAMES) if random.random() < 0.03 else info.filename
            for _ in range(random.choice((0, 1, 2)) if random.random() < 0.1 else 1):
                new.writestr(name, content)
    return buffer.getvalue()


def _npy_header(content: bytes, random: Random) -> bytes:
    descr = random.choice(("|u1", "<i8", "|O", "<f4", "|V2000000000", "<U100000000", "|S1", ">i2"))
    shape = tuple(random.choice((*NUMBERS, 3, 8, 6, -1)) for _ in range(random.randrange(6)))
    text = f"{{'descr': {descr!r}, 'fortran_order': {random.random() < 0.5}, 'shape': {shape}, }}\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + content[128:]


def of_image(data: bytes, random: Random) -> bytes:
    """Blows; and a PNG of any size, with valid checksums, whose pixels are few or very many."""
    if random.random() < 0.9 or not data.startswith(b"\x89PNG"):
        head = random.choice((64, 200, len(data)))
        return scramble(data[:head], random) + data[head:]
    sides = [random.choice((0, 1, 12, 2000, 60000, 10**6, 2**31 - 1, 2**32 - 1)) for _ in range(2)]
    depth, colour = random.choice((1, 2, 8, 16)), random.choice((0, 2, 3, 4, 6))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", *sides, depth, colour, 0, 0, random.randrange(2))),
        (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6))),
        (b"IDAT", zlib.compress(bytes(min(sides[0] * sides[1], 10**6)))),
        (b"IEND", b""),
    )
    made = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        made += struct.pack(">I", len(content)) + name + content + checksum
    return made


def of_onnx(data: bytes, random: Random) -> bytes:
    """Blows, or a model that says another thing in a valid file."""
    if random.random() < 0.5:
        return scramble(data, random)
    model = onnx.load_from_string(data)
    graph = model.graph
    for _ in range(random.choice((1, 2, 3))):
        tensor, node = random.choice(graph.initializer), random.choice(graph.node)
        kind = random.randrange(8)
        if kind == 0:
            del tensor.dims[:]
            tensor.dims.extend(
                random.choice((*NUMBERS[:-1], 3, 4, -1)) for _ in range(random.randrange(5))
            )
        elif kind == 1:
            tensor.data_type = random.randrange(30)
        elif kind == 2 and tensor.external_data:
            entry = random.choice(tensor.external_data)
            entry.value = random.choice(
                (*map(str, NUMBERS), "-1", "b.bin", "../out.bin", *TEXTS[:6])
            )
        elif kind == 3:
            node.op_type = random.choice(
                ("Relu", "Conv", "Reshape", "ConstantOfShape", "Expand", "If", "x")
            )
        elif kind == 4:
            node.input[random.randrange(len(node.input))] = random.choice(
                ("", "x", "w", "b", "y", "none")
            )
        elif kind == 5 and node.attribute:
            node.attribute[0].i = random.choice((-1, 7, 2**62))
        elif kind == 6:
            shape = random.choice((graph.input[0], graph.output[0])).type.tensor_type.shape
            random.choice(shape.dim).dim_value = random.choice((-1, 0, 2**40, 8))
        else:
            graph.node.append(random.choice(graph.node))
    return model.SerializeToString()


def of_run(data: bytes, random: Random) -> bytes:
    """One of the files of a run, changed: which, and its new content (a link for none)."""
    name = random.choice((CONFIG, METRICS, METRICS, EXAMPLES, ONNX_FILE, STUDENT_FILE))
    content = bytes.fromhex(json.loads(data)[name])
    if random.random() < 0.05:
        return name.encode() + b"\n"
    if name.endswith(".json") and random.random() < 0.7:
        return name.encode() + b"\n" + json_text(json.loads(content), random)
    change = of_zip if name == EXAMPLES else of_safetensors if name == STUDENT_FILE else scramble
    return name.encode() + b"\n" + change(content, random)


def of_text(data: bytes, random: Random) -> bytes:
    """A word that an option could get."""
    if random.random() < 0.3:
        return random.choice(
            (*TEXTS, "1" + "0" * 5000, "w" + "9" * 5000 + "a4", "9x" * 200 + "9")
        ).encode()
    return scramble(data, random) if random.random() < 0.7 else data * random.choice((2, 3, 200))


# --- loaders


def read_npz_(data: bytes, folder: Path) -> None:
    (folder / "data.npz").write_bytes(data)
    load_data(folder / "data.npz", SHAPE, CLASSES)


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


def run_files() -> dict[str, bytes]:
    metrics = {
        "teacher": {"top1": 90.0},
        "student": {"top1": 89.5},
        "seconds": {"total": 1.5},
        "steps": 8,
        EXPORT: {"sha256": "0" * 64, "path": ONNX_FILE},
    }
    return {
        CONFIG: json.dumps({"gdfq": "0.1.0", "recipe": {"class": "Recipe"}}).encode(),
        METRICS: json.dumps(metrics).encode(),
        EXAMPLES: npz(images=np.zeros((2, *SHAPE), np.uint8)),
        ONNX_FILE: onnx_file(),
        STUDENT_FILE: student(),
    }


def read_run(data: bytes, folder: Path) -> None:
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
    keeper = Checkpoints(folder)
    keeper.begin({"seed": 0}, {"torch": "2"})
    keeper.hold("student", network())
    keeper.save()


def read_onnx(data: bytes, folder: Path) -> None:
    (folder / "b.bin").write_bytes(bytes(16))
    (folder / "m.onnx").write_bytes(data)
    size_of(folder / "m.onnx")
    next(side_by_side([folder / "m.onnx"], SHAPE, seconds=1e-9, batches=(1,), threads=(1,)))


def read_text(data: bytes, _: Path) -> None:
    text = data.decode(errors="replace")
    calls: list[Callable[[], object]] = [
        lambda: Bits.parse(text),
        lambda: Keep.parse(text),
        lambda: find_recipe(text),
        lambda: Loaded(nn.Identity()).input(_Shape().convert(text, None, None), (0.5,), None),
        lambda: Preprocessing.of(1, _Numbers().convert(text, None, None), None),
        lambda: _Size().convert(text, None, None),
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
RUN = run_files()


@dataclass(frozen=True)
class Loader:
    """What reads files, valid files for it, how they are changed, and how many are tried of 100."""

    read: Callable[[bytes, Path], None]
    valid: Sequence[bytes]
    change: Callable[[bytes, Random], bytes]
    share: int


LOADERS = {
    "npz": Loader(read_npz_, [images_npz()], of_zip, 16),
    "image folder": Loader(read_images, image_files(), of_image, 16),
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
    "quantized network, signed": Loader(read_student, [student()], of_document, 4),
    "run folder": Loader(
        read_run, [json.dumps({name: data.hex() for name, data in RUN.items()}).encode()], of_run, 3
    ),
    "checkpoint": Loader(read_checkpoint, [checkpoint()], of_checkpoint, 4),
    "ONNX": Loader(read_onnx, [onnx_file()], of_onnx, 6),
    "options": Loader(read_text, WORDS, of_text, 5),
}


def made(name: str, seed: int, index: int) -> bytes:
    """The input of that number."""
    loader, random = LOADERS[name], Random(f"{seed}/{name}/{index}")  # noqa: S311
    return loader.change(random.choice(loader.valid), random)


# --- the run


class Watch:
    """What the interpreter says it does: files outside the folder, processes, sockets."""

    def __init__(self, folder: Path) -> None:
        paths = {sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")}
        # Tracebacks quote sources.
        sources = (str(Path(operators.__file__).parents[1]), __file__, os.path.abspath(sys.argv[0]))
        known = (*map(os.path.realpath, paths), *paths, *sources, "/proc/self", "/dev/null")
        self.roots = (str(folder), *known)
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | bytes):
            if not os.path.realpath(os.fsdecode(args[0])).startswith(self.roots):
                self.seen.append(f"open {args[0]!r}")
        elif event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn")):
            self.seen.append(f"{event} {args!r:.200}")


def outcome(loader: Loader, data: bytes, folder: Path, watch: Watch) -> str:
    """`accepted`, `refused`, or what went wrong."""
    watch.seen.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = "accepted"
    try:
        loader.read(data, folder)
    except GdfqError as error:
        found = "refused"
        if isinstance(error.__cause__, MemoryError) or "can't allocate memory" in str(error):
            found = f"memory was asked for in vain: {error}"
    except BaseException as error:  # Rust's panics are no Exceptions
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        found = f"{type(error).__name__}: {error} ({Path(frame.f_code.co_filename).name}:{line})"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if grown > MEMORY:
        found = f"took {grown:.0f} MiB"
    if watch.seen:
        found = f"did: {'; '.join(watch.seen[:3])}"
    return found


def chunk(
    name: str, seed: int, first: int, last: int, counter: mmap.mmap, folder: Path
) -> dict[str, Any]:
    """Inputs first..last of a loader, in this process."""
    warnings.simplefilter("ignore")
    _high_water(reset=True)
    base, size = _status("VmRSS"), _status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (int(size + ROOM) * 2**20,) * 2)
    os.chdir(folder)
    watch, started = Watch(folder), time.process_time()
    found: dict[str, Any] = {"inputs": 0, "accepted": 0, "refused": 0, "failures": []}
    for index in range(first, last):
        data = made(name, seed, index)
        counter[:8] = (index + 1).to_bytes(8, "little")
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(10 * SECONDS)  # for what waits
        what = outcome(LOADERS[name], data, folder, watch)
        signal.setitimer(signal.ITIMER_PROF, 0)
        found["inputs"] += 1
        if what in found:
            found[what] += 1
        else:
            found["failures"].append(failure(index, what, data))
    return {
        **found,
        "cpu_seconds": time.process_time() - started,
        "peak_mib": round(_high_water() - base),
    }


def failure(index: int, what: str, data: bytes) -> dict[str, Any]:
    content = base64.b64encode(zlib.compress(data)).decode()
    return {"index": index, "what": what[:400], "zlib_base64": content[:20000]}


def _status(key: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def _high_water(*, reset: bool = False) -> float:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmHWM")


def in_child(name: str, seed: int, first: int, last: int) -> dict[str, Any]:
    """The same in a child process; when it dies, what it read last is a failure."""
    counter = mmap.mmap(-1, 8)
    counter[:8] = first.to_bytes(8, "little")
    with tempfile.TemporaryDirectory() as scratch:
        answer, folder = Path(scratch) / "answer", Path(scratch) / "files"
        folder.mkdir()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                answer.write_text(json.dumps(chunk(name, seed, first, last, counter, folder)))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if answer.exists() and status == 0:
            return json.loads(answer.read_text())
    reached = int.from_bytes(counter[:8], "little")
    if reached == first:
        raise SystemExit(f"{name}: the child process ended with status {status} before it began")
    what = f"the process ended with status {status} (27: {SECONDS} seconds passed)"
    lost = failure(reached - 1, what, made(name, seed, reached - 1))
    return {"inputs": reached - first, "accepted": 0, "refused": 0, "failures": [lost]}


def added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    total = {key: one.get(key, 0) + other.get(key, 0) for key in ("inputs", "accepted", "refused")}
    seconds = round(one.get("cpu_seconds", 0) + other.get("cpu_seconds", 0), 1)
    peak = max(one.get("peak_mib", 0), other.get("peak_mib", 0))
    failures = [*one.get("failures", []), *other["failures"]]
    return {**total, "cpu_seconds": seconds, "peak_mib": peak, "failures": failures}


def table(loaders: dict[str, Any]) -> str:
    lines = [
        "| loader | inputs | refused | accepted | failures | CPU seconds | memory at most |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in loaders.items():
        counts = " | ".join(f"{row[key]:,}" for key in ("inputs", "refused", "accepted"))
        lines.append(
            f"| {name} | {counts} | {len(row['failures'])} | {row['cpu_seconds']:.0f} | "
            f"{row['peak_mib']} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=100_000, help="in all; a fresh run's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(LOADERS))
    parser.add_argument("--index", type=int, help="one input, in this process")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.index is not None:
        with tempfile.TemporaryDirectory() as folder:
            data = made(options.only, options.seed, options.index)
            LOADERS[options.only].read(data, Path(folder))
        return
    torch.set_num_threads(1)
    packed.from_safetensors(student())  # what torch imports for the first one is no input's fault
    asked = {"seed": options.seed, "inputs": options.inputs}
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    if {key: results.get(key) for key in asked} != asked:
        results = {**asked, "versions": _versions(), "wall_seconds": 0.0, "loaders": {}}
    for name, loader in LOADERS.items():
        count = options.inputs * loader.share // 100
        while options.only in (None, name):
            so_far = results["loaders"].get(name, {})
            done = so_far.get("inputs", 0)
            if done >= count:
                break
            started = time.perf_counter()
            found = in_child(name, options.seed, done, min(done + CHUNK, count))
            results["loaders"][name] = added(so_far, found)
            results["wall_seconds"] = round(
                results["wall_seconds"] + time.perf_counter() - started, 1
            )
            write_json(options.out, results)
    print(table(results["loaders"]))
    cpu = sum(row["cpu_seconds"] for row in results["loaders"].values())
    print(f"\n{cpu / 60:.1f} minutes of one core, {results['wall_seconds'] / 60:.1f} by the clock")
    sys.exit(any(row["failures"] for row in results["loaders"].values()))


def _versions() -> dict[str, str]:
    modules = (torch, np, onnx, onnxruntime, safetensors)
    return {module.__name__: module.__version__ for module in modules}


if __name__ == "__main__":
    main()
