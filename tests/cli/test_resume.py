"""Runs that a signal stops, and that the same command resumes."""

import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from support.command_line import arguments

from gdfq.cli import main
from gdfq.execution.listeners import History
from gdfq.execution.progress import Step
from gdfq.runs.folder import RunFolder

WHOLE = ("student.safetensors", "student.onnx", "examples.npz", "history.jsonl")


def stopped(monkeypatch: pytest.MonkeyPatch, call: list[str], number: int, rows: int) -> int:
    """Run a command that gets a signal at its n-th row of history."""

    class Signals(History):
        def __call__(self, step: Step) -> None:
            super().__call__(step)
            nonlocal rows
            rows -= 1
            if rows == 0:
                os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr("gdfq.cli.quantize.History", Signals)
        return main(call)


def metrics(folder: Path) -> Any:
    found = json.loads((folder / "metrics.json").read_text())
    del found["seconds"], found["export"]["seconds"]
    return found


def test_stopped_run_resumes_and_writes_the_same_files(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--steps", "8", "--test", f"{place}/test.npz"]
    assert main(arguments(place, *more, out="whole")) == 0
    call, out = arguments(place, *more), place / "out"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert stopped(monkeypatch, call, signal.SIGINT, 2) == 130
    assert f"stopped by SIGINT; to resume, run: gdfq quantize --resume {place}" in (
        error := capsys.readouterr().err
    )
    assert error.count("--resume") == 1
    assert not (out / "metrics.json").exists()
    assert stopped(monkeypatch, [*call, "--resume"], signal.SIGTERM, 3) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert main(call) == 0
    assert "resumes from its checkpoint" in capsys.readouterr().out
    for name in WHOLE:
        assert (out / name).read_bytes() == (place / "whole" / name).read_bytes(), name
    assert metrics(out) == metrics(place / "whole")
    assert sorted(os.listdir(out)) == sorted(os.listdir(place / "whole"))


def test_printed_command_resumes_the_run(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a command as a sweep writes it, with the model behind `--`."""
    command, model, *options = arguments(place)
    assert stopped(monkeypatch, [command, *options, "--", model], signal.SIGTERM, 2) == 143
    said = capsys.readouterr().err
    again = shlex.split(said.partition("run: gdfq ")[2].splitlines()[0])
    assert main(again) == 0
    assert "resumes from its checkpoint" in capsys.readouterr().out


def test_configuration_of_a_resumed_run_has_the_last_options(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stopped(monkeypatch, arguments(place), signal.SIGTERM, 2) == 143
    assert main(arguments(place, "--test", f"{place}/test.npz")) == 0
    config = json.loads((place / "out" / "config.json").read_text())
    assert config["test"] == f"{place}/test.npz"


def test_signal_during_the_export_stops_the_run(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("gdfq.cli.quantize.QuantizedNetwork.export", export)
    assert main(arguments(place)) == 143
    assert not (place / "out" / "metrics.json").exists()


def test_other_options_do_not_resume_the_run(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = arguments(place)
    assert stopped(monkeypatch, call, signal.SIGTERM, 2) == 143
    before = {path: path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()}
    for more, message in (
        (["--seed", "1"], "card.seed was 0 and is 1"),
        (["--bits", "w3a4"], "card.bits.weights was 4 and is 3"),
        (["--steps", "8"], "recipe.steps was 4 and is 8"),
        (["--mean", ".4,.5,.5"], "card.preprocessing.mean was [0.5, 0.5, 0.5] and is [0.4"),
    ):
        assert main([*call, *more]) == 2
        assert message in capsys.readouterr().err
    after = {path: path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()}
    assert after == before


def test_resume_fails_without_a_checkpoint(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(place, "--resume")) == 2
    assert "out has none. Remove --resume" in capsys.readouterr().err


def test_folder_in_use_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(place / "out"):
        assert main(arguments(place)) == 2
    assert "another one is using" in capsys.readouterr().err
    assert not (place / "out" / "config.json").exists()
