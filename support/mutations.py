"""Damaged and hostile versions of valid files, drawn from a random generator."""

import copy
import io
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import onnx
import safetensors.torch
import yaml

from gdfq.deploy import safetensors as packed

NUMBERS = (0, 1, 127, 128, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)
TEXTS = ("", "..", "../../etc/passwd", "/dev/zero", "<script>alert(1)</script>", "\u202e\U0001f600",
         "\x00", "__class__", "forward", "os.system", "import os", "a" * 5000, "nan", "aten.zeros.default",
         "float64", "w4a4", "import", "%s%n")  # fmt: skip
NAMES = tuple(text for text in TEXTS if text.strip("\0"))
"""Of files, which end at a null."""
VALUES: tuple[Any, ...] = (None, True, -1, 0, 1, 3, 2**31, 2**63, 10**400, -1.5, 1e308, math.inf, math.nan,
                           [], {}, [[]], [10**9] * 4, {"node": "x"}, {"float": "nan"})  # fmt: skip


def scramble(data: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """Change bytes at random places, without regard to their format."""
    damaged = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        at, length = random.randrange(len(damaged) + 1), random.choice((1, 2, 4, 8, 64, 1024))
        kind = random.randrange(8)
        if kind == 0 and damaged:
            damaged[at % len(damaged)] ^= 1 << random.randrange(8)
        elif kind == 1:
            damaged[at : at + length] = random.randbytes(length)
        elif kind == 2:
            del damaged[at:]
        elif kind == 3:
            del damaged[at : at + length]
        elif kind == 4:
            damaged[at:at] = damaged[at : at + length] * random.choice((1, 2, 100))
        elif kind == 5:
            other = random.choice(others or (bytes(damaged),))
            damaged[at:] = other[random.randrange(len(other) + 1) :]
        elif kind == 6:
            width, order = random.choice((2, 4, 8)), random.choice(("little", "big"))
            number = random.choice(NUMBERS) % 2 ** (8 * width)
            damaged[at : at + width] = number.to_bytes(width, order)
        else:
            damaged[at : at + length] = bytes([random.choice((0, 255, 48, 125))]) * length
    return bytes(damaged)


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
    """Random changes, or a header edited as JSON with the right length."""
    if random.random() < 0.5:
        return scramble(data, random)
    length = int.from_bytes(data[:8], "little")
    header = json_text(json.loads(data[8 : 8 + length]), random)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def of_checkpoint(data: bytes, random: Random) -> bytes:
    """Random changes, or a checkpoint with an edited tree; its name has its hash either way."""
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
    """Random changes, or a valid archive with members changed, left out or doubled."""
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
    """Random changes, or a PNG of any size with valid checksums."""
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
    """Random changes, or a valid file with an edited model."""
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
    """A change of one file of a run: its name and new content (none stands for a link)."""
    files = json.loads(data)
    name = random.choice(list(files))
    content = bytes.fromhex(files[name])
    head = name.encode() + b"\n"
    if random.random() < 0.05:
        return head
    if name.endswith(".json") and random.random() < 0.7:
        return head + json_text(json.loads(content), random)
    changes = {".npz": of_zip, ".safetensors": of_safetensors}
    return head + changes.get("." + name.rpartition(".")[2], scramble)(content, random)


def of_text(data: bytes, random: Random) -> bytes:
    """A value for an option."""
    if random.random() < 0.3:
        return random.choice(
            (*TEXTS, "1" + "0" * 5000, "w" + "9" * 5000 + "a4", "9x" * 200 + "9")
        ).encode()
    return scramble(data, random) if random.random() < 0.7 else data * random.choice((2, 3, 200))


def of_sweep(data: bytes, random: Random) -> bytes:
    """Bytes of YAML, or its values as a tree: JSON is YAML."""
    if random.random() < 0.4:
        return scramble(data, random)
    return json_text(yaml.safe_load(data), random)
