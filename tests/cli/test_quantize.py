"""`gdfq quantize`: options, files, exit codes, clear errors."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import networks
from support.command_line import arguments

import gdfq
from gdfq.cli import main
from gdfq.models.registry import weights_hash


def test_default_recipe_is_fast_with_placement_full(place: Path) -> None:
    words = arguments(place)
    at = words.index("--recipe")
    assert main(words[:at] + words[at + 2 :]) == 0
    config = json.loads((place / "out" / "config.json").read_text())
    assert (config["recipe"]["name"], config["placement"]) == ("fast", "full")
    history = (place / "out" / "history.jsonl").read_text().splitlines()
    stages = [json.loads(line)["stage"] for line in history]
    assert stages[0] == "images"
    assert stages[-3:] == ["tune"] * 3


def test_run_writes_all_files_and_can_be_evaluated(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = ["--test", f"{place}/test.npz"]
    assert main(arguments(place, "--bits", "w4a6", "--seed", "5", *test)) == 0
    out = place / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "examples.npz",
        "history.jsonl",
        "metrics.json",
        "student.onnx",
        "student.safetensors",
    ]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 4
    assert metrics["seconds"]["total"] >= metrics["seconds"]["tune"] > 0
    assert 0 <= metrics["teacher"]["top1"] <= 100
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"]["source"]["statistics"] == 0.1
    assert config["recipe"]["tuning"]["optimizer"]["lr"] == 1e-4
    assert (config["seed"], config["bits"], config["placement"]) == (5, "w4a6", "relu")
    model = networks.make("Residual").eval()  # its hash is that of the user's module
    assert config["weights_sha256"] == weights_hash(model)
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [(h["stage"], h["step"]) for h in history] == [
        ("calibrate", 1),
        ("tune", 2),
        ("tune", 3),
        ("tune", 4),
    ]
    assert {"generator", "bns", "boundary", "student", "ce", "kd"} <= history[-1].keys()
    printed = capsys.readouterr()
    assert "tune 4/4" in printed.err  # plain lines when piped
    assert "\x1b" not in printed.err

    # The saved network needs neither the factory nor its weights.
    for name in ("net.py", "networks.py", "w.safetensors"):
        (place / name).unlink()
    assert gdfq.load(out).evaluate(place / "test.npz") == pytest.approx(metrics["student"]["top1"])
    assert main(["evaluate", str(out), *test]) == 0
    assert f"top-1 {metrics['student']['top1']:.2f} %" in capsys.readouterr().out
    for option, words in (
        (["--model", "nowhere.py:net"], "--model is for language models. Remove it"),
        (["--weights", "w.safetensors"], "--weights are those of --model, which is missing"),
    ):
        assert main(["evaluate", str(out), *test, *option]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("weights", ["w.pt", "nested.pt"])
def test_all_weight_formats_give_the_same_network(place: Path, weights: str) -> None:
    assert main(arguments(place, out="a")) == 0
    assert main(arguments(place, weights=weights, out="b")) == 0
    a, b = ((place / run / "student.safetensors").read_bytes() for run in "ab")
    assert a == b


def test_missing_mean_and_std_give_a_warning(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = arguments(place)
    for option in ("--mean", "--std"):
        del call[call.index(option) : call.index(option) + 2]
    assert main(call) == 0
    assert "warning: no --mean and --std given" in capsys.readouterr().err


def broken_weights(place: Path, change: Any) -> None:
    state = networks.make("Residual").state_dict()
    change(state)
    save_file(state, place / "w.safetensors")


@pytest.mark.parametrize(
    ("prepare", "call", "message"),
    [
        (None, {"model": "absent"}, "'absent' is not there"),
        (None, {"model": "value"}, "'value' is a int"),
        (None, {"model": "nothing"}, "returned a NoneType"),
        (None, {"model": "broken"}, "no disk"),
        (None, {"weights": "absent.pt"}, "no weights file"),
        (None, {"weights": "."}, "is a folder. Give a file in it"),
        (None, {"weights": "net.py"}, "without pickled code"),
        (None, {"weights": "test.npz"}, "is neither"),
        (lambda p: broken_weights(p, lambda s: s.pop("fc.bias")), {}, "missing: fc.bias"),
        (
            lambda p: broken_weights(p, lambda s: s.update(extra=torch.zeros(1))),
            {},
            "surplus: extra",
        ),
        (
            lambda p: broken_weights(p, lambda s: s.update({"fc.bias": torch.zeros(6)})),
            {},
            r"another shape: fc.bias [6] for [5]",
        ),
        (lambda p: broken_weights(p, lambda s: s["fc.bias"].fill_(torch.nan)), {}, "NaN"),
        (lambda p: (p / "out").write_text("a file"), {}, "out is a file. Give a folder"),
        (lambda p: (p / "net.py").write_text("1/0"), {}, "must be importable"),
    ],
)
def test_invalid_networks_weights_and_folders_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], prepare: Any, call: Any, message: str
) -> None:
    if prepare is not None:
        prepare(place)
    assert main(arguments(place, **call)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (place / "out").is_dir()  # not even an empty folder stays


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bits", "4"], "w4a4"),
        (["--bits", "w9a4"], "2 to 8"),
        (["--recipe", "fastest"], "no recipe 'fastest'"),
        (["--input", "3by8"], "3x32x32"),
        (["--input", "0x8x8"], "3x32x32"),
        (["--input", "3x8"], "must accept an input of 3x8"),
        (["--input", "1x8x8"], "each of the 1 input channels"),
        (["--mean", "a,b,c"], "commas between"),
        (["--mean", "0.5,0.5"], "each of the 3 input channels"),
        (["--placement", "t2"], "t2"),
        (["--device", "cuda"], "here: PyTorch finds no CUDA GPU; got 'cuda'"),
        (["--nonsense"], "--nonsense"),
        (["--steps", "2"], "at least 4"),
        (["--recipe", "real"], "--data"),
        (["--test", "absent.npz"], "no data at absent.npz"),
        (["--test", "{place}/far.npz"], "labels must lie in 0..4"),
        (["--test", "{place}/bare.npz"], "test images need labels"),
        (["--data", "{place}/wide.npz"], "must have the network's input shape [3, 8, 8]"),
        (["--seed", "-1"], "-1 is not in the range"),
        (["--test", "{place}/net.py"], "is neither"),
    ],
)
def test_invalid_options_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    more = [part.format(place=place) for part in more]
    assert main(arguments(place, *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (place / "out").exists()


def test_folder_with_a_foreign_file_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "out").mkdir()
    (place / "out" / "metrics.json").write_text("{}")
    assert main(arguments(place)) == 2
    assert "has metrics.json. Choose another --out" in capsys.readouterr().err
    assert [path.name for path in (place / "out").iterdir()] == ["metrics.json"]


def test_finished_run_is_not_overwritten(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(place)) == 0
    before = (place / "out" / "student.safetensors").read_bytes()
    assert main(arguments(place, "--seed", "1")) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (place / "out" / "student.safetensors").read_bytes() == before


def test_unfinished_run_does_not_load_and_can_be_repeated(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place / "out"
    assert main(arguments(place)) == 0
    (folder / "metrics.json").unlink()
    for call in (["evaluate", "--test", f"{place}/test.npz"], ["export"], ["bench"]):
        assert main([call[0], str(folder), *call[1:]]) == 2
        assert "must have finished; the one in" in capsys.readouterr().err
    (folder / "student.safetensors").unlink()
    (folder / "config.json").unlink()
    assert main(["evaluate", str(folder), "--test", f"{place}/test.npz"]) == 2
    assert "a run that has finished" in capsys.readouterr().err
    (folder / "student.onnx").unlink()
    (folder / "examples.npz").unlink()
    (folder / "history.jsonl").unlink()
    assert main(arguments(place)) == 0


def test_diverging_run_fails_without_a_result(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(self: Any, student: Any, *_: object) -> Any:
        return {"student": student[0].sum() * torch.nan}

    monkeypatch.setattr("gdfq.tuning.distill.Distillation.losses", diverge)
    assert main(arguments(place)) == 1
    assert "failed: the student's loss must stay finite" in capsys.readouterr().err
    assert not (place / "out" / "student.safetensors").exists()


def gdfq_process(*call: str) -> subprocess.Popen[str]:
    # A shell's background job ignores SIGINT and so would its child: put the handler back.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from gdfq.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, *call], stderr=subprocess.PIPE, text=True
    )


def test_control_c_stops_the_run_with_exit_code_130(place: Path) -> None:
    process = gdfq_process(*arguments(place, "--steps", "100000"))
    history = place / "out" / "history.jsonl"
    for _ in range(600):
        if history.exists() and history.stat().st_size:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "stopped" in error
    assert "Traceback" not in error
    assert not (place / "out" / "student.safetensors").exists()
    assert not (place / "out" / "metrics.json").exists()


def test_foreign_files_are_not_changed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "project"
    folder.mkdir()
    for name in ("config.json", "student.onnx"):
        (folder / name).write_text('{"mine": 1}')
    assert main(arguments(place, out="project")) == 2
    assert "has config.json, student.onnx" in capsys.readouterr().err
    assert (folder / "student.onnx").read_text() == '{"mine": 1}'


def test_factory_imports_modules_beside_it(place: Path) -> None:
    (place / "late.py").write_text("def factory():\n    import net\n    return net.factory()\n")
    call = arguments(place)
    call[1] = f"{place}/late.py:factory"
    assert main(call) == 0


@pytest.mark.parametrize("content", [b"", b"hello world"])
def test_files_without_weights_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (place / "bad.pt").write_bytes(content)
    assert main(arguments(place, weights="bad.pt")) == 2
    assert "without pickled code" in capsys.readouterr().err


def test_metrics_describe_the_export(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(place)) == 0
    metrics = json.loads((place / "out" / "metrics.json").read_text())
    export = metrics["export"]
    assert export["bytes"] == (place / "out" / "student.onnx").stat().st_size
    assert export["inside"]["agreement"] == 100
    assert export["seconds"] > 0


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("torch.onnx.export", RuntimeError("no form for aten.weird")),
        ("gdfq.deploy.export.write_checked", OSError(28, "No space left on device")),
        ("gdfq.deploy.onnx.target.computed_in_float", KeyError("of a bug")),
    ],
)
def test_failed_export_does_not_fail_the_run(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: Exception,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(where, refuse)
    assert main(arguments(place)) == 0
    assert "no ONNX file was written" in capsys.readouterr().err
    assert "export" not in json.loads((place / "out" / "metrics.json").read_text())
    assert not (place / "out" / "student.onnx").exists()
    assert (place / "out" / "metrics.json").exists()


def test_invalid_layer_bits_leave_no_folder(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(place, "--layer-bits", "nowhere=8")) == 2
    shown = capsys.readouterr()
    assert "nowhere" in shown.err
    assert "network" not in shown.out
    assert not (place / "out").exists()


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1"])
def test_checkpoint_interval_must_be_a_finite_number(
    seconds: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(place, "--checkpoint-every", seconds)) == 2
    assert "--checkpoint-every" in capsys.readouterr().err


def test_run_that_will_have_no_file_says_so_at_its_start(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--bits", "wfp4afp8", "--recipe", "quick")
    assert main(arguments(place, *options, "--no-onnx", out="without")) == 0
    assert "ONNX file" not in capsys.readouterr().err
    assert main(arguments(place, *options)) == 0
    said = capsys.readouterr().err
    assert said.index("the run will write no ONNX file") < said.index("calibrate")


def test_one_number_normalises_all_channels(place: Path) -> None:
    words = arguments(place)
    for option, value in (("--mean", "0.5"), ("--std", "0.3")):
        words[words.index(option) + 1] = value
    assert main(words) == 0
    config = json.loads((place / "out" / "config.json").read_text())
    assert config["normalisation"]["mean"] == [0.5] * 3
