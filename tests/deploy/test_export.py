"""Export of files: targets, notes, and failures that leave no file."""

from pathlib import Path
from typing import Any

import onnx
import pytest
from support import networks
from support.choice import checked

import gdfq
from gdfq import UsageError
from gdfq.graph.memory import training_bytes
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import Recipe


def test_notes_name_float_operators_of_placement_relu(tiny: Recipe, tmp_path: Path) -> None:
    quantized = gdfq.quantize(networks.captured("Residual"), networks.images(1), "w4a4", tiny)
    note, version = quantized.export(tmp_path / "q.onnx").notes
    assert version == "needs ONNX Runtime 1.23 or newer"
    assert note == "computed in float: conv1, conv2, fc, 1 add, 1 average pool"


def test_full_disk_leaves_no_file(
    small: QuantizedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        small.export(tmp_path / "q.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["onnx", checked("pt2"), checked("safetensors")])
def test_file_is_compared_on_as_many_examples_as_fit(
    small: QuantizedNetwork, tmp_path: Path, suffix: str
) -> None:
    """Also with a network that was read from a file."""
    small.save(tmp_path / "saved")
    for network in (small, gdfq.load(tmp_path / "saved")):
        assert len(network.examples[0]) > 3
        assert network.export(tmp_path / f"q.{suffix}").inside.images == len(network.examples[0])
        three = 3 * training_bytes(network.network.graph)
        assert network.export(tmp_path / f"q.{suffix}", memory=three).inside.images == 3
        assert network.export(tmp_path / f"q.{suffix}", memory=1).inside.images == 1


def test_target_follows_the_file_name(small: QuantizedNetwork, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end with \.onnx, \.tflite, \.pt2, "):
        small.export(tmp_path / "q.gguf")
    with pytest.raises(UsageError, match=r"one of onnx, litert, pt2, safetensors, .*; got 'gguf'"):
        small.export(tmp_path / "q.onnx", target="gguf")
    for name, target in (("q.tflite", "onnx"), ("q.onnx", "safetensors"), ("q.pte", "qnn")):
        with pytest.raises(UsageError, match=f"those of another; got '{name}'. Name it 'q"):
            small.export(tmp_path / name, target=target)
    with pytest.raises(UsageError, match="raw input is for the targets onnx, "):
        small.export(tmp_path / "q.pt2", raw_input=True)
    with pytest.raises(
        UsageError, match=r"safe x86 is for the targets onnx, .*; the target is 'pt2'"
    ):
        small.export(tmp_path / "q.pt2", safe_x86=True)
    assert small.export(tmp_path / "new" / "q.bin", target="safetensors").target == "safetensors"
    with pytest.warns(gdfq.errors.GdfqDeprecationWarning, match="is now called target"):
        assert small.export(tmp_path / "old.bin", format="pt2").target == "pt2"
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="must be a folder"):
        small.export(tmp_path / "file" / "q.onnx")


def test_float_layers_are_float_in_the_file(tiny: Recipe, tmp_path: Path) -> None:
    quantized = gdfq.quantize(
        networks.captured("Branches"),
        networks.images(1),
        "w4a4",
        tiny,
        layer_bits=["stem.*=float", "fc=8"],
    )
    note, version = quantized.export(tmp_path / "q.onnx").notes
    assert version == "needs ONNX Runtime 1.23 or newer"
    assert note.startswith("computed in float: stem.0, ")
    model = onnx.load(tmp_path / "q.onnx")
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    assert kinds["grouped.weight"] == onnx.TensorProto.INT4
    assert kinds["stem.0.weight"] == onnx.TensorProto.FLOAT
    assert kinds["fc.weight"] == onnx.TensorProto.INT8
    quantized.export(tmp_path / "q.safetensors")
    assert gdfq.load(tmp_path / "q.safetensors").card.layer_bits == ("stem.*=float", "fc=8")


def test_notes_name_operators_that_run_in_float(tiny: Recipe, tmp_path: Path) -> None:
    quantized = gdfq.quantize(networks.captured("Preactivation"), networks.images(1), "w4a4", tiny)
    note, version = quantized.export(tmp_path / "q.onnx").notes
    assert version == "needs ONNX Runtime 1.23 or newer"
    _, _, listed = note.partition("computed in float: ")
    assert {"conv", "squeeze", "fc1", "1 silu", "2 average pool"} <= set(listed.split(", "))


def test_two_writers_of_one_path_do_not_collide(tmp_path: Path) -> None:
    """A second export of the same name, while the first one's file is checked."""
    from gdfq.files.atomic import write_atomically, write_checked

    def check(written: Any) -> Any:
        write_atomically(tmp_path / "a", b"second")
        return written.read_bytes()

    assert write_checked(tmp_path / "a", b"first", check) == b"first"
    assert (tmp_path / "a").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
