"""The folder of a run when writing fails."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import arguments

import gdfq
from gdfq import UsageError
from gdfq.cli import main
from gdfq.execution.listeners import History
from gdfq.execution.progress import Step
from gdfq.runs.folder import RunFolder


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ENOENT])
def test_failing_folder_stops_the_run_with_advice(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The disk is full, or the folder is read-only or removed, from one row of history on."""

    class Failing(History):
        def __call__(self, step: Step) -> None:
            if step.index == 3:
                raise OSError(number, os.strerror(number))
            super().__call__(step)

    with monkeypatch.context() as patch:
        patch.setattr("gdfq.cli.quantize.History", Failing)
        assert main(arguments(place, "--steps", "8")) == 1
    error = capsys.readouterr().err
    assert os.strerror(number) in error
    assert "correct this, then give the same command again" in error
    assert not (place / "out" / "student.safetensors").exists()


def test_full_disk_at_the_end_loses_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    call = arguments(place, "--steps", "8")
    with monkeypatch.context() as patch:
        patch.setattr("gdfq.quantized.write_atomically", full)
        assert main(call) == 1
    assert "No space left" in capsys.readouterr().err
    rows = (place / "out" / "history.jsonl").read_text()
    assert main(call) == 0
    assert (place / "out" / "history.jsonl").read_text() == rows
    assert json.loads((place / "out" / "metrics.json").read_text())["steps"] == 8


def test_lock_of_a_dead_process_is_released(tmp_path: Path) -> None:
    program = (
        "import os, sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); "
        "lock.acquire(); os.kill(os.getpid(), 9)"
    )
    dead = subprocess.run([sys.executable, "-c", program, str(tmp_path / ".lock")], check=False)
    assert dead.returncode == -9
    with RunFolder(tmp_path):
        pass


def test_report_of_an_unfinished_run_does_not_outlive_it(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.begin({"gdfq": "0"})
        folder.history.write_text("{}")
        with folder.checkpoints as checkpoints:
            checkpoints.begin({}, {})
            checkpoints.save()
    gdfq.write_report(tmp_path)
    assert (tmp_path / "report.html").exists()
    with RunFolder(tmp_path) as folder:
        folder.begin({"gdfq": "0"})
        assert not (tmp_path / "report.html").exists()
        assert not (tmp_path / "report.json").exists()
        assert folder.history.exists()


def test_load_refuses_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a run that has finished"):
        gdfq.load(tmp_path)
