"""Saved networks: packed codes, round trips, and damaged files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import networks

import gdfq
from gdfq import UsageError
from gdfq.deploy.safetensors import STUDENT_FILE, digest, pack, unpack
from gdfq.graph.capture import Captured
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import Recipe

Saved = tuple[QuantizedNetwork, Path]
"""A quantized network and the folder that it was saved in."""


def test_exported_codes_are_packed_at_their_bits(small: QuantizedNetwork, tmp_path: Path) -> None:
    exported = small.export(tmp_path / "q.safetensors")
    loaded = gdfq.load(tmp_path / "q.safetensors")
    x = networks.images(4)
    assert torch.equal(loaded(x), small(x))
    assert loaded.card == small.card
    # Codes, scales and zero points of weights and activations, biases: nothing else.
    tensors = dict(small.network.named_buffers())
    needed = sum(
        -(-t.numel() // 2) if name.endswith("codes") else t.nbytes for name, t in tensors.items()
    )
    header = int(exported.notes[0].split()[0])
    assert exported.bytes - header <= 1.03 * needed


@given(bits=st.integers(2, 8), data=st.data())
def test_packed_codes_round_trip(bits: int, data: DataObject) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    count = int(torch.tensor(shape).prod())
    values = data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count))
    codes = torch.tensor(values, dtype=torch.int8).view(shape)
    packed = pack(codes, bits)
    assert len(packed) == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, shape), codes)


def test_packed_codes_match_hand_computed_bytes() -> None:
    # 4 bits: codes -8, 7, 0 are 0, 15, 8 unsigned; the first lies in the low half of its byte.
    assert pack(torch.tensor([-8, 7, 0], dtype=torch.int8), 4).tolist() == [0xF0, 0x08]


@pytest.fixture(scope="module")
def saved_once(teacher: Captured, tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    quantized = gdfq.quantize(teacher, networks.images(1), "w3a5", tiny, placement="full")
    folder = tmp_path_factory.mktemp("saved")
    quantized.save(folder)
    return quantized, folder


@pytest.fixture
def saved(saved_once: Saved, tmp_path: Path) -> Saved:
    """A quantized network, and a folder with its files that a test may change."""
    quantized, folder = saved_once
    shutil.copytree(folder, tmp_path / "out")
    return quantized, tmp_path / "out"


def test_load_gives_what_was_saved(saved: Saved) -> None:
    quantized, folder = saved
    loaded = gdfq.load(folder)
    x = networks.images(9)
    assert torch.equal(loaded(x), quantized(x))
    assert loaded.card == quantized.card
    assert not any(path.name.endswith(".partial") for path in folder.iterdir())


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_network_round_trips(name: str, tiny: Recipe, tmp_path: Path) -> None:
    quantized = gdfq.quantize(networks.captured(name), networks.images(1), "w4a4", tiny)
    quantized.save(tmp_path)
    x = networks.images(5)
    assert torch.equal(gdfq.load(tmp_path)(x), quantized(x))


def test_saved_codes_are_packed(saved: Saved) -> None:
    _, folder = saved
    tensors = load_file(folder / STUDENT_FILE)
    assert tensors["quantized.conv1.codes"].numel() == -(-8 * 3 * 9 * 3 // 8)


def _edit(folder: Path, change: Callable[[Any], object], sign: bool = True) -> None:
    """Change the header, and update its hash as an attacker would."""
    path = folder / STUDENT_FILE
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["gdfq"])
    before = document["sha256"]
    change(document)
    if sign and document["sha256"] == before:
        document["sha256"] = digest(document, load_file(path))
    save_file(load_file(path), path, {"gdfq": json.dumps(document)})


def _first(document: Any, kind: Any) -> Any:
    return next(node for node in document["graph"] if node["kind"] == kind)


def test_file_without_resize_values_loads(saved: Saved) -> None:
    quantized, folder = saved
    _edit(folder, lambda document: document["card"]["preprocessing"].pop("resize"))
    assert gdfq.load(folder).card == quantized.card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=99), "version 99"),
        (lambda d: d.update(format="other"), "'other'"),
        (lambda d: d.update(sha256="0" * 64), "damaged, was changed"),
        (lambda d: d.pop("graph"), "damaged"),
        (lambda d: d.update(graph={}), "damaged"),
        (lambda d: d.update(card={}), "damaged"),
        (lambda d: d["card"].update(classes="x"), "damaged"),
        (lambda d: d["card"].update(class_names="names"), "damaged"),
        (lambda d: d["card"].update(class_names=[["a"]] * 4), "damaged"),
        (lambda d: d["card"].update(class_names=[["a"]] * 4 + [[]]), "damaged"),
        (lambda d: d["card"].update(class_names=[["a"]] * 4 + [[1]]), "damaged"),
        (lambda d: d["card"]["preprocessing"].update(mean=[0.0]), "damaged|each of the 3"),
        (lambda d: d["card"]["preprocessing"]["resize"].update(crop=0), "damaged"),
        (lambda d: d["card"]["preprocessing"]["resize"].update(other=1), "damaged"),
        (lambda d: next(iter(d["codes"].values())).update(shape=[10**9]), "damaged"),
        (lambda d: _first(d, "tensor").update(target=[]), "not text"),
        (lambda d: _first(d, "input").update(name="import"), "not a new node name"),
        (lambda d: _first(d, "operator").update(target="os.system"), r"calls 'os\.system'"),
        (lambda d: _first(d, "operator").update(target="aten.set_.default"), r"aten\.set_"),
        (lambda d: _first(d, "tensor").update(target="x; import os"), "not in the file"),
        (lambda d: _first(d, "operator").update(name="a b"), "not a new node name"),
        (lambda d: _first(d, "operator").update(kwargs={"a=1); f(": 0}), "impossible name"),
        (lambda d: _first(d, "operator").update(args=[{"node": "nowhere"}]), "not readable"),
        (lambda d: _first(d, "operator").update(kind="module"), "unknown kind"),
        (lambda d: d["graph"].pop(), "must have inputs"),
    ],
)
def test_changed_file_does_not_load(
    saved: Saved, change: Callable[[Any], object], message: str
) -> None:
    _, folder = saved
    _edit(folder, change)
    with pytest.raises(UsageError, match=message):
        gdfq.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["card"].update(seed=d["card"]["seed"] + 1),
        lambda d: d["card"]["preprocessing"].update(mean=[0.5, 0.5, 0.5]),
        lambda d: _first(d, "operator").update(target="aten.relu.default"),
        lambda d: next(iter(d["codes"].values())).update(bits=2),
    ],
)
def test_header_with_a_wrong_hash_does_not_load(
    saved: Saved, change: Callable[[Any], object]
) -> None:
    _, folder = saved
    _edit(folder, change, sign=False)
    with pytest.raises(UsageError, match="damaged, was changed"):
        gdfq.load(folder)


def test_changed_tensors_do_not_load(saved: Saved) -> None:
    _, folder = saved
    path = folder / STUDENT_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match="damaged, was changed"):
        gdfq.load(folder)


@pytest.mark.parametrize("part", [0, 7, 100, -1])
def test_truncated_file_does_not_load(saved: Saved, part: int) -> None:
    _, folder = saved
    path = folder / STUDENT_FILE
    path.write_bytes(path.read_bytes()[:part])
    with pytest.raises(UsageError, match="is damaged"):
        gdfq.load(folder)


def test_other_safetensors_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="no such file"):
        gdfq.load(tmp_path / "w.safetensors")


def test_load_reads_examples_and_metrics(saved: Saved) -> None:
    quantized, folder = saved
    loaded = gdfq.load(folder)
    assert loaded.examples[0].shape == quantized.examples[0].shape == (8, *networks.SHAPE)
    pixels = quantized.card.preprocessing.pixels(*quantized.examples)
    assert torch.equal(loaded.card.preprocessing.pixels(*loaded.examples), pixels)


def test_failed_write_leaves_no_file(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized, _ = saved
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        quantized.save(tmp_path / "full")
    assert list((tmp_path / "full").iterdir()) == []
    with pytest.raises(UsageError):
        gdfq.load(tmp_path / "full")
