"""`gdfq export` and `gdfq bench`."""

import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.command_line import arguments

from gdfq import TARGETS
from gdfq.cli import main
from gdfq.cli.targets import facts
from gdfq.deploy.benchmark import Candidate
from gdfq.deploy.onnx.session import onnx_calls
from gdfq.errors import UsageError

_QUICK = ("--batch", "1", "--threads", "1")


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
    assert "100.0 % same predictions on 32 extreme inputs" in printed
    assert main(["export", str(out), "--out", f"{place}/new/net.safetensors"]) == 0
    assert main(["evaluate", f"{place}/new/net.safetensors", "--test", f"{place}/test.npz"]) == 0
    assert main(["bench", str(out), "--seconds", "0.01", *_QUICK, "--batch", "3"]) == 0
    table = capsys.readouterr().out
    assert "times smaller" in table
    assert table.count("full precision") == table.count("student.onnx") == 2
    assert f"{'student.safetensors':24}{'gdfq':14}" in table
    assert "not measured on this machine" in table
    before = (out / "student.safetensors").read_bytes()
    assert main(["export", str(out), "--format", "safetensors"]) == 2
    assert "is the network itself" in capsys.readouterr().err
    assert (out / "student.safetensors").read_bytes() == before
    assert main(["bench", f"{place}/new/net.safetensors"]) == 2
    assert "the folder of a run that holds exported files" in capsys.readouterr().err
    assert main(["export", str(out), "--model", "hf:some/model"]) == 2
    assert "--model is for targets whose files hold weights" in capsys.readouterr().err
    options = ["--raw-input", "--safe-x86"]
    assert main(["export", str(out), *options]) == 0
    assert "32 usual inputs" in capsys.readouterr().out
    assert main(["bench", str(out), "--seconds", "0.01", *_QUICK]) == 0
    model = onnx.load(out / "student.onnx")
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    model.doc_string = "changed"
    onnx.save(model, out / "student.onnx")
    assert main(["bench", str(out)]) == 2
    assert "changed afterwards. Export it again" in capsys.readouterr().err


def test_file_of_a_run_is_exported_as_the_run(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "out"
    assert main(arguments(place, "--no-onnx", "--test", f"{place}/test.npz")) == 0
    assert main(["export", str(out)]) == 0
    noted, exported = (out / "metrics.json").read_text(), (out / "student.onnx").read_bytes()
    capsys.readouterr()
    assert main(["export", str(out / "student.safetensors"), "--raw-input"]) == 0
    assert (out / "student.onnx").read_bytes() != exported
    assert main(["bench", str(out), "--seconds", "0.01", *_QUICK]) == 0
    assert main(["export", str(out / "student.safetensors")]) == 0
    assert (out / "student.onnx").read_bytes() == exported  # with the accuracies of the run
    facts = {entry.key for entry in onnx.load(out / "student.onnx").metadata_props}
    assert {"top1_teacher", "top1_student"} <= facts
    assert json.loads((out / "metrics.json").read_text())["export"] == json.loads(noted)["export"]

    other = out / "other.safetensors"
    other.write_bytes((out / "student.safetensors").read_bytes())
    capsys.readouterr()
    assert main(["export", str(other)]) == 2
    assert "must be of its network" in capsys.readouterr().err
    assert (out / "student.onnx").read_bytes() == exported
    assert main(["export", str(other), "--out", f"{place}/new/net.onnx"]) == 0


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


def test_bench_compares_with_other_files(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(place / "out")
    assert main(arguments(place)) == 0
    file = _network([["N", 3, 8, 8]], place, outside=True)
    assert (place / "against.data").stat().st_size >= 4 * 3 * 64
    (place / "out" / "student.openvino.onnx").write_bytes(b"12345")
    monkeypatch.setattr(
        "gdfq.deploy.target.find_spec", lambda name: None if name == "openvino" else find_spec(name)
    )
    assert main(["bench", out, "--against", file, "--seconds", "0.01", *_QUICK]) == 0
    size = sum((place / name).stat().st_size for name in ("against.onnx", "against.data"))
    printed = capsys.readouterr().out
    assert f"{'full precision':24}{'ONNX Runtime':14}{f'{size / 1024:.1f} KiB':>10}" in printed
    missing = (
        r"student\.openvino\.onnx +OpenVINO .* not installed: pip install 'gdfq\[openvino\]'\n"
    )
    assert re.search(missing, printed)
    for inputs in (
        [[1, 3, 8, 8]],
        [["N", 3, 8, 8], ["N", 3, 8, 8]],
        [["N", "C", 8, 8]],
        [["N", 3, 4, 4]],
    ):
        with pytest.raises(UsageError, match="must take batches Nx3x8x8 of any size N"):
            onnx_calls(Path(_network(inputs, place)), 1)([(1, 3, 8, 8)])
    assert main(["bench", out, "--against", file, "--seconds", "0.01", *_QUICK]) == 2
    assert "must take batches Nx3x8x8 of any size N" in capsys.readouterr().err
    (place / "against.onnx").write_bytes(b"hello")
    assert main(["bench", out, "--against", str(place / "against.onnx")]) == 2
    assert "must be an ONNX model" in capsys.readouterr().err


def test_bench_does_not_load_a_file_that_may_hold_code(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A .pt2 file is written again from the network: one that others wrote could run code."""
    out = place / "out"
    assert main(arguments(place, "--target", "pt2")) == 0
    (out / "student.pt2").write_bytes(b"not the file that was compared")
    assert main(["bench", str(out)]) == 2
    assert "student.pt2 must be the file that was compared" in capsys.readouterr().err
    metrics = (out / "metrics.json").read_text()
    (out / "metrics.json").write_text(metrics.replace('"sha256"', '"unknown"'))
    contents: dict[str, bytes] = {}

    def read(files: Sequence[Candidate], *_: object, **__: object) -> list[Any]:
        contents.update({file.name: file.path.read_bytes() for file in files})
        return []

    monkeypatch.setattr("gdfq.cli.bench.side_by_side", read)
    assert main(["bench", str(out)]) == 0
    assert list(contents) == ["full precision", "student.pt2"]
    assert contents["student.pt2"].startswith(b"PK")


def test_bench_measures_a_run_without_an_onnx_file(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ai_edge_litert", reason="needs LiteRT: pip install 'gdfq[litert]'")
    assert main(arguments(place, "--target", "litert")) == 0
    capsys.readouterr()
    assert main(["bench", str(place / "out"), "--seconds", "0.01", *_QUICK]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"full precision +LiteRT .*\nstudent\.tflite +LiteRT .* smaller .*x\n", printed
    )
    metrics = json.loads((place / "out" / "metrics.json").read_text())
    assert [t["runtime"] for t in metrics["bench"]] == ["LiteRT", "LiteRT"]


def test_targets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets"]) == 0
    printed = capsys.readouterr().out
    for name, target in TARGETS.items():
        assert re.search(rf"^{name} +{re.escape(target.summary)}$", printed, re.MULTILINE)
        assert f"file         {target.file_name}" in printed
    assert "ONNX Runtime 1.18 or newer (1.21 for weights below 8 bits, 1.23 for" in printed
    assert "images" in facts(TARGETS["onnx"])
    assert "placement" not in facts(TARGETS["onnx"])
    assert "images" not in facts(TARGETS["compressed-tensors"])
    assert facts(TARGETS["compressed-tensors"])["placement"] == "tokens"
    assert facts(TARGETS["qnn"])["placement"] == "full"
    assert facts(TARGETS["qnn"])["changes"] == (
        "weights of fewer than 8 bits are symmetric; the inputs of a concatenation and its result "
        "share one grid"
    )


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
    assert main(arguments(place, "--target", "onnx", "--no-onnx")) == 2
    assert "--no-onnx writes none; got both, with target 'onnx'" in capsys.readouterr().err
    assert not (place / "out").exists()
