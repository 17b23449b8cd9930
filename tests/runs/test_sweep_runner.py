"""Sweeps run, fail and resume."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from support.narrowing import present

from gdfq.cli import main
from gdfq.errors import UsageError
from gdfq.runs.sweep import Network, Sweep
from gdfq.runs.sweep_runner import Row, run_sweep, table

NETWORK = """
from torch import nn

def small():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).eval()

def broken():
    raise RuntimeError("no such weights here")
"""


OPTIONS = "input: 1x8x8, mean: 0.5, std: [0.5], test: test.npz"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NETWORK)
    images = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), np.uint8)
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(12) % 3)
    return tmp_path


def written(folder: Path, text: str) -> Path:
    file = folder / "sweep.yaml"
    file.write_text(text)
    return file


def silent(*_: object) -> None:
    pass


@pytest.mark.check
def test_sweep_records_failures_and_skips_finished_runs(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = f"""
        networks:
          - {{model: "net.py:broken", name: broken, {OPTIONS}}}
          - {{model: "net.py:small", {OPTIONS}}}
        recipes: round
        steps: 1
        """
    file = written(place, grid)
    assert main(["sweep", str(file), "--jobs", "2"]) == 1
    said = capsys.readouterr()
    assert "1 of 2 runs" in said.err
    assert "no such weights here" in said.err
    rows = json.loads((place / "sweep" / "sweep.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["failed", "finished"]
    assert "no such weights here" in rows[0]["error"]
    for row in rows[1:]:
        metrics = json.loads((place / "sweep" / row["folder"] / "metrics.json").read_text())
        assert row["student_top1"] == metrics["student"]["top1"]
        assert row["bytes"] == (place / "sweep" / row["folder"] / "student.onnx").stat().st_size
        config = json.loads((place / "sweep" / row["folder"] / "config.json").read_text())
        assert (config["seed"], config["threads"]) == (row["seed"], 1)
    with (place / "sweep" / "sweep.csv").open() as text:
        listed = list(csv.DictReader(text))
    assert [row["folder"] for row in listed] == [row["folder"] for row in rows]

    stamps = [
        (place / "sweep" / row["folder"] / "metrics.json").stat().st_mtime for row in rows[1:]
    ]
    only_sound = written(place, grid.replace("net.py:broken", "net.py:small"))
    assert main(["sweep", str(only_sound), "--jobs", "2"]) == 0
    assert stamps == [
        (place / "sweep" / row["folder"] / "metrics.json").stat().st_mtime for row in rows[1:]
    ]
    assert "net.py:small" in capsys.readouterr().out


@pytest.mark.check
def test_stopped_sweep_resumes(place: Path) -> None:
    """The sweep stops its run, and runs it again."""
    slow = NETWORK + "\nimport pathlib, time\ndef slow():\n"
    slow += "    if not pathlib.Path('go').exists():\n"
    slow += "        pathlib.Path('here').touch(); time.sleep(600)\n    return small()\n"
    (place / "net.py").write_text(slow)
    file = written(
        place,
        f"networks: [{{model: 'net.py:slow', {OPTIONS}}}]\nrecipes: round\nsteps: 1",
    )
    command = [sys.executable, "-m", "gdfq", "sweep", str(file), "--jobs", "1"]
    sweep = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 300
    while not (place / "here").exists() and time.monotonic() < until:
        time.sleep(0.1)
    sweep.send_signal(signal.SIGTERM)
    _, said = sweep.communicate(timeout=300)
    assert sweep.returncode == 130
    assert "the same command resumes" in said
    rows = json.loads((place / "sweep" / "sweep.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["waiting"]
    (place / "go").touch()
    assert main(command[3:]) == 0
    rows = json.loads((place / "sweep" / "sweep.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["finished"]


def test_killed_run_is_reported_with_its_signal(place: Path) -> None:
    (place / "net.py").write_text("import os\ndef small():\n    os.kill(os.getpid(), 9)\n")
    sweep = Sweep((Network("net.py:small", input="1x8x8"),))
    (row,) = run_sweep(sweep, place / "out", home=place, jobs=1, tell=silent)
    assert row.status == "failed"
    assert "SIGKILL" in present(row.error)


def test_failed_run_is_reported_with_its_own_message_not_that_of_an_earlier_attempt(
    place: Path,
) -> None:
    """The log of a run grows with each attempt."""
    sweep = Sweep((Network("net.py:small", input="1x8x8"),))
    reported = []
    for body in (
        "raise RuntimeError('no such weights here')",
        "print('out of disk', flush=True); os._exit(3)",
        "os._exit(3)",
    ):
        (place / "net.py").write_text(f"import os\ndef small():\n    {body}\n")
        (row,) = run_sweep(sweep, place / "out", home=place, jobs=1, tell=silent)
        assert row.status == "failed"
        reported.append(present(row.error))
    assert "no such weights here" in reported[0]
    assert reported[1:] == ["out of disk", "exit code 3"]
    log = (place / "out" / row.folder / "log.txt").read_text()
    assert "no such weights here" in log
    assert "out of disk" in log


def test_table_has_mean_and_deviation_over_seeds() -> None:
    def row(
        seed: int, top1: float | None, status: Literal["finished", "failed"] = "finished"
    ) -> Row:
        return Row("net", "w4a4", "fast", None, "", seed, status, 90.0, top1, seconds=1.0)

    heading, line = table([row(0, 80.0), row(1, 82.0), row(2, None, "failed")]).splitlines()
    assert heading.split() == [
        "network",
        "bits",
        "recipe",
        "seeds",
        "float",
        "quantized",
        "seconds",
    ]
    assert line.split() == [
        "net", "w4a4", "fast", "2", "90.00", "81.00", "±", "1.41", "1", "1", "failed",
    ]  # fmt: skip


def test_run_sweep_refuses_zero_jobs(place: Path) -> None:
    with pytest.raises(UsageError, match="at least 1; got 0"):
        run_sweep(Sweep((Network("a"),)), place / "out", home=place, jobs=0, tell=silent)


def test_runs_have_the_threads_of_the_sweep(place: Path) -> None:
    (place / "net.py").write_text(
        "import os, pathlib\ndef small():\n"
        "    pathlib.Path('seen').write_text(os.environ['OMP_NUM_THREADS'])\n"
    )
    sweep = Sweep((Network("net.py:small", input="1x8x8"),))
    run_sweep(sweep, place / "out", home=place, jobs=1, threads=3, tell=silent)
    assert (place / "seen").read_text() == "3"
    assert os.environ.get("OMP_NUM_THREADS") != "3"
