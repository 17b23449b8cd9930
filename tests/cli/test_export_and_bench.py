"""`gdfq export` and `gdfq bench`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.command_line import arguments

from gdfq import TARGETS
from gdfq.cli import main


def test_export_writes_files_that_bench_measures(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(place, "--no-onnx")) == 0
    out = place / "out"
    assert not (out / "student.onnx").exists()
    assert main(["bench", str(out)]) == 2
    assert f"Create it with: gdfq export {out}" in capsys.readouterr().err
    assert main(["export", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{out / 'student.onnx'}, " in printed
    assert "100.0 % same predictions on 32 extreme images" in printed
    assert main(["export", str(out), "--out", f"{place}/new/net.safetensors"]) == 0
    assert main(["evaluate", f"{place}/new/net.safetensors", "--test", f"{place}/test.npz"]) == 0
    assert main(["bench", str(out), "--seconds", "0.01"]) == 0
    table = capsys.readouterr().out
    assert "times smaller" in table
    assert table.count("full precision") == table.count("w4a4") == 5
    before = (out / "student.safetensors").read_bytes()
    assert main(["export", str(out), "--format", "safetensors"]) == 2
    assert "is the network itself" in capsys.readouterr().err
    assert (out / "student.safetensors").read_bytes() == before
    assert main(["bench", f"{place}/new/net.safetensors"]) == 2
    assert "the folder of a run that holds student.onnx" in capsys.readouterr().err
    options = ["--raw-input", "--safe-x86"]
    assert main(["export", str(out), *options]) == 0
    assert "32 usual images" in capsys.readouterr().out
    assert main(["bench", str(out), "--seconds", "0.01"]) == 0
    model = onnx.load(out / "student.onnx")
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    model.doc_string = "changed"
    onnx.save(model, out / "student.onnx")
    assert main(["bench", str(out)]) == 2
    assert "changed afterwards. Export it again" in capsys.readouterr().err


def _network(inputs: list[list[Any]], folder: Path, outside: bool = False) -> str:
    """An ONNX file that sums its inputs, with a constant that may be in a file of its own."""
    values = [
        onnx.helper.make_tensor_value_info(f"x{i}", onnx.TensorProto.FLOAT, shape)
        for i, shape in enumerate(inputs)
    ]
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    names = [value.name for value in values]
    constant = onnx.numpy_helper.from_array(
        np.ones((1, 3, 8, 8) if outside else (1,), np.float32), "one"
    )
    node = onnx.helper.make_node("Sum", [*names, "one"], ["y"])
    graph = onnx.helper.make_graph([node], "g", values, [result], [constant])
    opset = [onnx.helper.make_opsetid("", 21)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    path = folder / "against.onnx"
    onnx.save(model, path, save_as_external_data=outside, location="against.data", size_threshold=0)
    return str(path)


def test_bench_compares_with_other_files(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(place / "out")
    assert main(arguments(place)) == 0
    file = _network([["N", 3, 8, 8]], place, outside=True)
    assert (place / "against.data").stat().st_size >= 4 * 3 * 64
    assert main(["bench", out, "--against", file, "--seconds", "0.01"]) == 0
    size = sum((place / name).stat().st_size for name in ("against.onnx", "against.data"))
    assert f"size      {size / 1024:.1f} KiB full precision" in capsys.readouterr().out
    for inputs in (
        [[1, 3, 8, 8]],
        [["N", 3, 8, 8], ["N", 3, 8, 8]],
        [["N", "C", 8, 8]],
        [["N", 3, 4, 4]],
    ):
        call = ["bench", out, "--against", _network(inputs, place), "--seconds", "0.01"]
        assert main(call) == 2
        error = capsys.readouterr().err
        assert "must take one batch of images Nx3x8x8 of any size N" in error
    (place / "against.onnx").write_bytes(b"hello")
    assert main(["bench", out, "--against", str(place / "against.onnx")]) == 2
    assert "must be an ONNX model" in capsys.readouterr().err


def test_targets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets"]) == 0
    printed = capsys.readouterr().out
    for name, target in TARGETS.items():
        assert f"{name:14}{target.summary}" in printed
        assert f"file         {target.file_name}" in printed
    assert "ONNX Runtime 1.18 or newer (1.21 for weights below 8 bits, 1.23 for" in printed


def test_run_writes_the_file_of_its_target(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files of other targets beside student.onnx are noted by their names."""
    assert main(arguments(place, "--target", "pt2")) == 0
    out = place / "out"
    assert "student.pt2, " in capsys.readouterr().out
    assert not (out / "student.onnx").exists()
    assert json.loads((out / "config.json").read_text())["target"] == "pt2"
    metrics = json.loads((out / "metrics.json").read_text())
    assert "export" not in metrics
    assert metrics["exports"]["student.pt2"]["inside"]["agreement"] == 100
    assert main(["export", str(out), "--target", "onnxruntime"]) == 0
    assert "needs ONNX Runtime 1.23 or newer" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["export"]["path"] == "student.onnx"
    assert list(metrics["exports"]) == ["student.pt2"]


def test_unknown_target_is_refused_before_anything_is_read(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(place / "nothing"), "--target", "toaster"]) == 2
    assert "the target must be one of onnx, " in capsys.readouterr().err
    assert main(arguments(place, "--target", "toaster")) == 2
    assert "got 'toaster'" in capsys.readouterr().err
    assert not (place / "out").exists()
