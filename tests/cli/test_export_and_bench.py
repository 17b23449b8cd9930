"""`gdfq export` and `gdfq bench`."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.command_line import arguments

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
