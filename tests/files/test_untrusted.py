"""Untrusted files are refused with a GdfqError, at little cost and without side effects."""

import contextlib
import io
import json
import os
import pickle
import socket
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import valid_files
from support.loaders import LOADERS, RUN
from support.valid_files import CLASSES, SHAPE
from torch import Tensor

import gdfq
from gdfq.cli.types import Duration, Shape, Size
from gdfq.data.datasets import load_data
from gdfq.data.preprocessing import Resize
from gdfq.data.writers import ImageFiles
from gdfq.deploy import safetensors as packed
from gdfq.deploy.benchmark import size_of
from gdfq.deploy.onnx.session import onnx_session
from gdfq.deploy.safetensors import STUDENT_FILE
from gdfq.errors import GdfqError, UsageError
from gdfq.execution.checkpoints import Checkpoints
from gdfq.files.states import name_of
from gdfq.files.untrusted import header_bytes
from gdfq.functional.grid import Bits
from gdfq.models.registry import load_model, load_weights_
from gdfq.models.weights import read_weights
from gdfq.report import write_report
from gdfq.report.read import read_run
from gdfq.runs.folder import RunFolder
from gdfq.runs.metrics import check_export, read_metrics
from gdfq.runs.names import METRICS, ONNX_FILE
from gdfq.student.scheme import LayerBits


@pytest.mark.parametrize("name", LOADERS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(random=st.randoms(use_true_random=False))
@pytest.mark.filterwarnings("ignore")  # decoders warn of damage
def test_mutated_input_is_read_or_refused(name: str, random: Random) -> None:
    """The mutations of benchmarks.fuzz, chosen and minimised by hypothesis."""
    loader = LOADERS[name]
    data = loader.change(random.choice(loader.valid), random)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(GdfqError):
        loader.read(data, Path(folder))


@pytest.mark.parametrize("name", LOADERS)
def test_valid_inputs_of_the_fuzzing_are_accepted(name: str, tmp_path: Path) -> None:
    loader = LOADERS[name]
    valid = loader.valid[0] if name != "run folder" else b"config.json\n" + RUN["config.json"]
    loader.read(valid, tmp_path)


# --- .npz


def npz(path: Path, **members: bytes) -> Path:
    """An archive of raw members."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npy(shape: tuple[int, ...], descr: str = "|u1", content: bytes = b"") -> bytes:
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (npy((10**9, *SHAPE)), "says it has"),
        (npy((2**32, 2**32)), "says it has"),  # overflows to 0 in 64 bits
        (npy((1,), "|V2000000000"), "says it has"),
        (npy((1,), "|O", b"\x80\x04N."), "says it has|allow_pickle"),
        (npy((-1, -192), content=bytes(192)), "is neither"),
        (npy((), content=b"\1"), "single number"),
        (npy((2, *SHAPE), "<f8", bytes(2 * 8 * 192)), "must be uint8"),
        (bytes(2**26 + 1), "would unpack to"),
    ],
)
def test_npz_with_false_headers_is_refused(tmp_path: Path, member: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_data(npz(tmp_path / "x.npz", images=member), SHAPE, CLASSES)


def test_npz_with_pickled_arrays_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = pickle.dumps(valid_files.Trap())
    code += bytes(-len(code) % 8)  # as many bytes as so many objects would have
    npz(tmp_path / "x.npz", images=npy((len(code) // 8,), "|O", code))
    with pytest.raises(UsageError, match="is neither"):
        load_data(tmp_path / "x.npz", SHAPE, CLASSES)
    assert not (tmp_path / "trap").exists()


def test_npz_with_other_compression_is_refused(tmp_path: Path) -> None:
    """LZMA allocates as much memory as its header demands."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("images.npy", npy((1, *SHAPE), content=bytes(192)))
    with pytest.raises(UsageError, match="compressed in another way"):
        load_data(tmp_path / "x.npz", SHAPE, CLASSES)


def test_npz_that_compresses_well_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((10**5, *SHAPE), np.uint8))
    assert len(load_data(tmp_path / "x.npz", SHAPE, None)) == 10**5


# --- image folders


def png(path: Path, width: int, height: int) -> None:
    """A PNG of any size without its pixels."""
    made = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        made += struct.pack(">I", len(content)) + name + content
        made += struct.pack(">I", zlib.crc32(name + content))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(made)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(60000, 60000), (2**31 - 1, 1), (8193, 8193), (9000, 10000)])
def test_image_with_too_many_pixels_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    png(tmp_path / "a" / "x.png", *size)
    with pytest.raises(UsageError, match=r"more than 67,108,864|exceeds limit"):
        load_data(tmp_path, SHAPE, None)


def test_thin_image_is_refused_before_it_is_resized(tmp_path: Path) -> None:
    """1 x 2,000,000 pixels, resized to cover 224 x 224, would be 224 x 448,000,000."""
    (tmp_path / "a").mkdir()
    Image.new("RGB", (1, 2_000_000)).save(tmp_path / "a" / "x.png")
    with pytest.raises(UsageError, match="more than 16,777,216"):
        load_data(tmp_path, (3, 224, 224), None)
    with pytest.raises(ValueError, match="pixels are more"):
        Resize(crop=1e-9)(Image.new("RGB", (8, 8)), (8, 8))


def test_image_of_another_format_is_refused(tmp_path: Path) -> None:
    """Other decoders, such as that of PostScript, run programs."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    )
    with pytest.raises(UsageError, match="cannot identify"):
        load_data(tmp_path, SHAPE, None)


# --- links and names


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "outside" / "x.png")
    return tmp_path / "outside"


def test_image_folder_with_an_outside_link_is_refused(tmp_path: Path, outside: Path) -> None:
    folder = tmp_path / "data"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "x.png").symlink_to(outside / "x.png")
    with pytest.raises(UsageError, match="leads out of it"):
        load_data(folder, SHAPE, None)
    (folder / "a" / "x.png").unlink()
    (folder / "b").symlink_to(outside, target_is_directory=True)
    with pytest.raises(UsageError, match="leads out of it"):
        load_data(folder, SHAPE, None)


def test_links_within_an_image_folder_are_followed(tmp_path: Path, outside: Path) -> None:
    folder = tmp_path / "data"
    (folder / "ä <b>😀").mkdir(parents=True)
    (outside / "x.png").rename(folder / "ä <b>😀" / "x.png")
    (folder / "ä <b>😀" / "y.png").symlink_to("x.png")
    (tmp_path / "link").symlink_to(folder)
    assert len(load_data(tmp_path / "link", SHAPE, 1)) == 2


def test_pipe_in_an_image_folder_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "x.png")
    with pytest.raises(UsageError, match="a pipe or a device"):
        load_data(tmp_path, SHAPE, None)


@pytest.mark.parametrize("name", [STUDENT_FILE, METRICS, "examples.npz", "config.json", ONNX_FILE])
def test_run_folder_with_an_outside_link_is_refused(run: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "other").write_bytes((run / name).read_bytes())
    (run / name).unlink()
    (run / name).symlink_to(tmp_path / "other")
    with pytest.raises(UsageError, match="leads out of it"):
        check_export(run) if name == ONNX_FILE else gdfq.load(run)


def test_writing_into_a_run_replaces_links(run: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("precious")
    (run / METRICS).unlink()
    for name in ("config.json", STUDENT_FILE):
        (run / name).unlink()
        (run / name).symlink_to(tmp_path / "other")
    network, card = packed.from_safetensors(valid_files.student())
    gdfq.quantized.QuantizedNetwork(network, card).save(run)
    assert (tmp_path / "other").read_text() == "precious"
    assert not (run / STUDENT_FILE).is_symlink()


# --- weights


def pickled(path: Path, code: bytes) -> Path:
    """A torch file whose pickle is given."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", code)
        archive.writestr("x/version", "3\n")
    return path


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"\x80\x02cbuiltins\nbytearray\nI1099511627776\n\x85R.", "bytearray"),
        (b"\x80\x02c__builtin__\nbytearray\nI1099511627776\n\x85R.", "bytearray"),
        (b"\x80\x02ctorch\nTensor\nI1073741824\nI1024\n\x86R.", "torch Tensor"),
        (b"\x80\x02cos\nsystem\nX\x0a\x00\x00\x00touch trap\x85R.", "os system"),
        (b"\x80\x02(X\x0a\x00\x00\x00touch trapios\nsystem\n.", "INST"),
    ],
)
def test_torch_file_with_dangerous_pickle_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        read_weights(pickled(tmp_path / "x.pt", code))
    (tmp_path / "old.pt").write_bytes(code)  # as before torch 1.6
    with pytest.raises(UsageError, match=message):
        read_weights(tmp_path / "old.pt")
    assert not (tmp_path / "trap").exists()


def test_torch_file_with_compressed_members_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(10**6)}, buffer)
    with (
        zipfile.ZipFile(buffer) as old,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(UsageError, match="more bytes than it has"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_state_dict_of_every_dtype_is_read(tmp_path: Path, legacy: bool) -> None:
    types = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    state = {str(dtype): torch.ones(2, 3).to(dtype)[:, 1:] for dtype in types}
    state["parameter"] = torch.nn.Parameter(torch.ones(2))
    if not legacy:
        state["new"] = torch.ones(2).to(torch.float8_e4m3fn)
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    found = read_weights(tmp_path / "x.pt")
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in state.items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update({"0.weight": s["0.weight"].to(torch.complex64)}),
            "another type: 0.weight",
        ),
        (lambda s: s.update({"1.num_batches_tracked": torch.tensor(0.5)}), "another type: 1.num"),
        (
            lambda s: s.update({"0.weight": s["0.weight"].to_sparse()}),
            "pickled code|ordinary tensors",
        ),
        (
            lambda s: s.update({"0.weight": s["0.weight"].to("meta")}),
            "pickled code|ordinary tensors",
        ),
        (lambda s: s.update({7: torch.zeros(1)}), "ordinary tensors by name"),
        (lambda s: s.update({"é\u202e<b>": torch.zeros(1)}), "surplus: é\u202e<b>"),
    ],
)
def test_unsupported_tensors_are_refused(
    tmp_path: Path, change: Callable[..., object], message: str
) -> None:
    state = dict(valid_files.network().state_dict())
    change(state)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UsageError, match=message):
        load_weights_(valid_files.network(), tmp_path / "x.pt")


def test_overflowing_shape_is_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}
    header = json.dumps({"w": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UsageError, match="without pickled code"):
        read_weights(tmp_path / "x.safetensors")


# --- quantized networks and run folders


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    for name, content in RUN.items():
        (folder / name).write_bytes(content)
    return folder


def signed(change: Callable[..., Any]) -> bytes:
    """A stored network whose document was changed and signed again."""
    data = valid_files.student()
    header = json.loads(data[8 : header_bytes(data)])
    document = json.loads(header["__metadata__"]["gdfq"])
    tensors = safetensors.torch.load(data)
    change(document, tensors)
    document["sha256"] = packed.digest(document, tensors)
    return safetensors.torch.save(tensors, {"gdfq": json.dumps(document)})


def node(document: dict[str, Any], operator: str) -> dict[str, Any]:
    return next(n for n in document["graph"] if n["target"] == operator)


def replaced(operator: str, target: str, args: list[Any]) -> Callable[..., Any]:
    return lambda d, _: node(d, operator).update(target=target, args=args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: d["card"]["inputs"][0].update(shape=[3, 10**5, 10**5]), "damaged"),
        (lambda d, t: d["card"]["inputs"][0].update(shape=[3, float("inf"), 8]), "damaged"),
        (lambda d, t: d["card"]["inputs"][0].update(shape=[3, 9]), "must run on images"),
        (lambda d, t: d["card"].update(classes=6), "for 6 classes"),
        (lambda d, t: d["card"].update(outputs=[0, 1]), "outputs"),
        (lambda d, t: d["card"]["preprocessing"].update(mean=[[1], [2], [3]]), "damaged"),
        (lambda d, t: d["codes"]["conv.codes"].update(bits=10**15), "damaged"),
        (lambda d, t: d["codes"]["conv.codes"].update(shape=["a", 10**10]), "damaged"),
        (replaced("aten.relu.default", "aten.zeros.default", [[10**6, 10**6]]), "would have"),
        (replaced("aten.relu.default", "aten.relu.default", [7]), "must run on images"),
        (replaced("gdfq.dequantize", "gdfq.dequantize", [1, 2, 3, 4]), "no quantizer has"),
        (lambda d, t: node(d, "aten.relu.default").update(kwargs={"class": 1}), "impossible name"),
        (lambda d, t: node(d, "images").update(name="self"), "not readable|compiled"),
        (lambda d, t: node(d, "aten.relu.default").update(args=deep(60)), "damaged|must run"),
    ],
)
def test_network_file_with_false_values_is_refused(
    change: Callable[..., object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        packed.from_safetensors(signed(change))


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def test_codes_of_too_many_bits_are_refused() -> None:
    """2 to the power of so many bits would be a number of 125 GB."""
    with pytest.raises(ValueError, match="cannot have 1000000000000 bits"):
        packed.unpack(torch.empty(0, dtype=torch.uint8), 10**12, [0])


@pytest.mark.parametrize("name", ["forward", "__class__", "__dict__", "_modules", "graph"])
def test_tensor_with_the_name_of_an_attribute_is_refused(name: str) -> None:
    def change(document: Any, tensors: Any) -> None:
        tensors[name] = tensors.pop("fc.weight")
        node(document, "fc.weight").update(target=name)

    with pytest.raises(UsageError, match="stored graph is damaged"):
        packed.from_safetensors(signed(change))


def test_operator_with_a_large_output_is_refused_before_it_runs() -> None:
    """Each operator doubles its input; together they would take 2^40 bytes."""
    steps: list[dict[str, Any]] = [
        {"name": "big_0", "kind": "operator", "target": "aten.cat.default", "kwargs": {}}
    ]
    steps[0]["args"] = [[{"node": "images"}, {"node": "images"}], -1]
    for index in range(1, 40):
        before = {"node": f"big_{index - 1}"}
        steps.append({**steps[0], "name": f"big_{index}", "args": [[before, before], -1]})
    with pytest.raises(UsageError, match="would have"):
        packed.from_safetensors(signed(lambda d, _: d["graph"].__setitem__(slice(-1, -1), steps)))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**5,
        '{"teacher": ' * 10**5,
        '{"steps": 1' + "0" * 5000 + "}",
        '{"teacher": {"top1": 1' + "0" * 400 + "}}",
        '{"teacher": []}',
        '{"export": "x"}',
        "null",
        '"\\ud800',
        "\x00",
    ],
)
def test_damaged_metrics_are_refused(run: Path, text: str) -> None:
    (run / METRICS).write_text(text)
    for read in (read_metrics, gdfq.load, check_export):
        with pytest.raises(UsageError, match="damaged or was changed"):
            read(run)


def test_advice_for_damaged_metrics_gives_the_network(run: Path) -> None:
    expected = gdfq.load(run)
    (run / METRICS).write_text("damaged")
    with pytest.raises(UsageError, match="damaged or was changed") as refused:
        gdfq.load(run)
    call = str(refused.value).rpartition(": ")[2]
    assert call == f"gdfq.load('{run / STUDENT_FILE}')"
    network = gdfq.load(run / STUDENT_FILE)
    images = torch.rand(4, *SHAPE)
    assert network(images).equal(expected(images))
    assert not network.metrics


def test_last_of_two_equal_member_names_is_read(run: Path) -> None:
    (run / METRICS).write_text('{"steps": 1, "steps": 2}')
    assert read_metrics(run)["steps"] == 2


def test_report_is_written_into_the_folder_only(run: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (run / "report").symlink_to(tmp_path / "other")
    with pytest.raises(UsageError, match="leads out of it"):
        write_report(run)
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.parametrize("name", ["history.jsonl", "evidence.json", "evidence.npz", METRICS])
def test_report_reads_the_folder_only(run: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "other").write_bytes((run / name).read_bytes())
    (run / name).unlink()
    (run / name).symlink_to(tmp_path / "other")
    assert "leads out of it" in read_run(run).problems[name]


def test_report_escapes_names(run: Path) -> None:
    name = "<script>alert(1)</script>"
    config = {"gdfq": name, "model": name, "command": name, "recipe": {"class": name, "name": name}}
    (run / "config.json").write_text(json.dumps(config))
    (run / METRICS).write_text(json.dumps({"student": {name: name}, "teacher": {}, name: name}))
    assert name not in write_report(run).read_text()


def test_report_names_evidence_that_is_too_large(run: Path) -> None:
    npz(run / "evidence.npz", counts=bytes(2**26 + 1))
    (run / "evidence.json").write_text('{"version": 1, "deep": ' + "[" * 500 + "]" * 500 + "}")
    (run / METRICS).write_text('{"teacher": {"top1": 1' + "0" * 400 + '}, "student": {"top1": 1}}')
    found = read_run(run)
    assert "would unpack" in found.problems["evidence.npz"]
    assert "too deeply" in found.problems["evidence.json"]
    assert found.drop is None


def test_invalid_configuration_is_not_overwritten(run: Path) -> None:
    (run / METRICS).unlink()
    (run / "config.json").write_text("[" * 10**5)
    with pytest.raises(UsageError, match="files with the names that a run writes"):
        RunFolder(run)


def test_recipe_name_may_be_any_text() -> None:
    name = "<script>alert(1)</script>\u202e"
    _, card = packed.from_safetensors(signed(lambda d, _: d["card"].update(recipe=name)))
    assert card.recipe == name


# --- checkpoints, and what a run that goes on writes to


@pytest.mark.parametrize("name", ["history.jsonl", ".lock", "checkpoints", "config.json"])
def test_resumed_run_writes_into_its_folder_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "other").write_text('{"gdfq": 1}')
    (tmp_path / "run" / name).symlink_to(tmp_path / "other")
    with pytest.raises(UsageError, match="leads out of it"):
        RunFolder(tmp_path / "run")
    assert (tmp_path / "other").read_text() == '{"gdfq": 1}'


def test_images_are_not_written_through_links(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "images.npy").symlink_to(tmp_path / "absent")
    with pytest.raises(UsageError, match="already holds images"):
        ImageFiles(tmp_path / "run").prepare(SHAPE)


def state(document: dict[str, Any] | list[Any], **tensors: Tensor) -> bytes:
    return safetensors.torch.save(tensors, {"gdfq-state": json.dumps(document)})


def run_of(part: dict[str, Any] | None, **tensors: Tensor) -> bytes:
    """A checkpoint with one part."""
    parts = {"pairs": [["part", part]]}
    keys = {"settings": {"pairs": []}, "around": {"pairs": []}, "parts": parts}
    return state({"pairs": [[key, value] for key, value in keys.items()]}, **tensors)


PACKED = {
    "tensor": "w", "shape": [2**30], "stride": [1], "type": "float32", "planes": [1, 1, 1, 1]
}  # fmt: skip
"""Claims 4 GiB in planes of one byte."""


@pytest.mark.parametrize(
    "contents",
    [
        run_of({"tensor": "w", "shape": [10**6, 10**6], "stride": [0, 0]}, w=torch.zeros(1)),
        run_of({"tensor": "w", "shape": [4], "stride": [10**9]}, w=torch.zeros(4)),
        run_of({"tensor": "none", "shape": [1], "stride": [1]}),
        run_of({"pairs": [[[], 1]]}),
        run_of({"fixed": "0" * 32, "entry": "w"}),
        run_of({**PACKED, "planes": [4]}, w=torch.zeros(4).byte()),
        run_of({**PACKED, "planes": [1, 1, 1, 1]}, w=torch.zeros(4).byte()),
        run_of({**PACKED, "planes": "ab"}, w=torch.zeros(4).byte()),
        run_of({**PACKED, "type": "Tensor"}, w=torch.zeros(4).byte()),
        state([1, 2]),
        state({"pairs": [[key, 1] for key in ("settings", "around", "parts")]}),
        safetensors.torch.save({}, {"gdfq-state": "[" * 10**5}),
        safetensors.torch.save({}),
        b"no safetensors",
    ],
)
def test_invalid_checkpoint_is_refused(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / f"checkpoint-000001-{name_of(contents)}.safetensors"
    path.write_bytes(contents)
    with pytest.raises(UsageError, match="must be undamaged"):
        Checkpoints(tmp_path).begin({}, {})


def test_checkpoint_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    contents = run_of(None)
    (tmp_path / "run").mkdir()
    name = f"checkpoint-000001-{name_of(contents)}.safetensors"
    (tmp_path / name).write_bytes(contents)
    (tmp_path / "run" / name).symlink_to(tmp_path / name)
    with pytest.raises(UsageError, match="leads out of it"):
        Checkpoints(tmp_path / "run").begin({}, {})


def test_piece_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    """Otherwise 40 doublings would read it 2^40 times."""
    document = None
    for _ in range(40):
        contents = state([document, document])
        (tmp_path / f"piece-{name_of(contents)}.safetensors").write_bytes(contents)
        document = {"fixed": name_of(contents)}
    contents = run_of(document)
    (tmp_path / f"checkpoint-000001-{name_of(contents)}.safetensors").write_bytes(contents)
    Checkpoints(tmp_path).begin({}, {})


# --- ONNX


@pytest.mark.parametrize("place", ["../out.bin", "link.bin", "/etc/passwd", "sub/../../out.bin"])
def test_onnx_external_data_must_be_beside_the_file(tmp_path: Path, place: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "out.bin").write_bytes(bytes(16))
    (folder / "link.bin").symlink_to(tmp_path / "out.bin")
    model = onnx.load_from_string(valid_files.onnx_file())
    model.graph.initializer[1].external_data[0].value = place
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    for read in (size_of, onnx_session):
        with pytest.raises(UsageError):
            read(folder / "m.onnx")


def test_onnx_tensor_with_a_false_size_is_refused(tmp_path: Path) -> None:
    model = onnx.load_from_string(valid_files.onnx_file())
    model.graph.initializer[0].dims[:] = [2**31, 2**31]
    with pytest.raises(UsageError, match="ONNX Runtime can load"):
        onnx_session(model.SerializeToString())


# --- options, and the network


def test_option_of_many_digits_is_refused() -> None:
    with pytest.raises(UsageError, match="bits are written"):
        Bits.parse("w" + "9" * 5000 + "a4")
    with pytest.raises(UsageError, match="the bits of layers"):
        LayerBits.parse("last=" + "9" * 5000)
    for kind, text in (
        (Shape(), "9" * 5000 + "x3"),
        (Size(), "9" * 5000),
        (Duration(), "9" * 5000),
    ):
        with pytest.raises(click.BadParameter):
            kind.convert(text, None, None)


def test_too_large_input_shape_is_refused() -> None:
    from gdfq.models.registry import Loaded

    with pytest.raises(UsageError, match=r"at most 16,777,216 elements"):
        Loaded(torch.nn.Identity()).input((3, 10**6, 10**6))


def test_only_library_names_use_the_network(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    gdfq.load(run)
    for spec in ("resnet18", "http://host/net.pt2", "http://host/net.py:net", "net.onnx", "x:y"):
        with pytest.raises(UsageError):
            load_model(spec)
