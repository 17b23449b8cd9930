"""Several processes compute what one does, stop together, and write one run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import group_figures, networks
from support.choice import checked
from support.group_figures import difference
from support.places import ROOT
from support.trained_digits import TrainedDigits

from gdfq import demo
from gdfq.cli import main
from gdfq.errors import UsageError
from gdfq.execution.distributed import ALONE, Processes, joined

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}"
               f"{os.environ.get('PYTHONPATH', '')}"}  # fmt: skip


def torchrun(processes: int, *words: str, look: float = 0.1) -> list[str]:
    """The command line; `look` is the seconds between two checks for a dead process."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--monitor-interval={look}", f"--nproc-per-node={processes}", *words),
    ]


@pytest.fixture(scope="module")
def alone() -> Iterator[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield group_figures.figures(ALONE)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[2, checked(4)])
def together(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of several processes computed."""
    out, size = tmp_path_factory.mktemp("group"), request.param
    command = [sys.executable, "-m", "support.group_figures", str(out), str(size)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"{size}.{rank}.pt") for rank in range(size)]


def test_processes_compute_the_same(together: list[Any]) -> None:
    for one, other in pairwise(together):
        assert difference(one, other) == 0


@pytest.mark.parametrize("source", ["pool", "optimised"])
def test_images_of_several_processes_are_those_of_one(
    alone: dict[str, Any], together: list[Any], source: str
) -> None:
    """Three and five batches: fewer or more than there are processes."""
    assert difference(alone[source], together[0][source]) == 0


def test_generator_starts_as_on_the_whole_batch(alone: dict[str, Any], together: list[Any]) -> None:
    assert difference(alone["generators"], together[0]["generators"]) < 1e-5


def test_generator_learns_as_on_the_whole_batch(alone: dict[str, Any], together: list[Any]) -> None:
    """In double precision, because Adam turns a gradient that is only rounding into a full step."""
    for one in alone["long"].values():
        assert one["losses"].shape == (group_figures.STEPS, 3)
        assert one["losses"][0, 0] > one["losses"][-1, 0]
    assert difference(alone["long"], together[0]["long"]) < 1e-12


@pytest.mark.parametrize("student", ["float", "quantized", "paper", "moving"])
def test_first_step_of_several_processes_is_that_of_one(
    alone: dict[str, Any], together: list[Any], student: str
) -> None:
    one, several = alone[student], together[0][student]
    assert difference(one["losses"][0], several["losses"][0]) < 1e-5
    assert difference(one["gradients"], several["gradients"]) < 1e-5


def test_float_student_of_several_processes_is_that_of_one(
    alone: dict[str, Any], together: list[Any]
) -> None:
    assert len(alone["float"]["losses"]) == group_figures.STEPS
    assert alone["float"]["losses"][0, 0] > alone["float"]["losses"][-1, 0]
    assert difference(alone["float"], together[0]["float"]) < 1e-5


def test_single_process_has_the_whole_batch() -> None:
    x = torch.arange(6.0).view(3, 2)
    assert ALONE.mean(x) is ALONE.gather(x) is ALONE.shard(x) is ALONE.broadcast(0, x) is x
    ALONE.check_batch(7, "it")
    with joined(torch.device("cpu")) as group:
        assert (group.rank, group.size) == (0, 1)


def some(rank: int, size: int) -> Processes:
    group = Processes.__new__(Processes)
    group.rank, group.size = rank, size
    return group


def test_shards_are_of_equal_size_or_the_whole() -> None:
    x = torch.arange(6)
    assert [some(rank, 3).shard(x).tolist() for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert some(1, 4).shard(x) is x
    with pytest.raises(UsageError, match=r"6 images per batch.* 4 processes.*1, 2, 3, 6"):
        some(0, 4).check_batch(6, "recipe x")


FACTORY = """
import os, pathlib
from support import networks
def factory():
    place = pathlib.Path(__file__).parent
    (place / f"pid{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
    return networks.make("Residual")
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(FACTORY)
    images = np.random.default_rng(0).integers(0, 256, (40, *networks.SHAPE), np.uint8)
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(40) % networks.CLASSES)
    return tmp_path


def quantize(place: Path, *more: str) -> list[str]:
    return [
        *("-m", "gdfq", "quantize", f"{place}/net.py:factory", "--input=3x8x8"),
        *("--mean=.5,.5,.5", "--std=.3,.3,.3", f"--out={place}/out", *more),
    ]


@pytest.mark.check
def test_killed_process_stops_all_and_the_run_resumes_with_fewer(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = quantize(
        place, "--recipe=paper-no-boundary", "--steps=400", "--batch=8", "--checkpoint-every=0.1",
        f"--test={place}/test.npz", "--no-onnx", "--no-report",
    )  # fmt: skip
    # The one that lives must come to say so itself, before torchrun ends it.
    run = subprocess.Popen(
        torchrun(2, *words, look=20),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until = time.monotonic() + 240
    while not list(place.glob("out/checkpoints/checkpoint-*")) and time.monotonic() < until:
        time.sleep(0.1)
    os.kill(int((place / "pid1").read_text()), signal.SIGKILL)
    said, _ = run.communicate(timeout=240)
    assert run.returncode != 0
    assert "SIGKILL" in said
    assert "all processes of a run must live until its end" in said
    assert not (place / "out" / "metrics.json").exists()

    assert main(words[2:]) == 0
    again = capsys.readouterr()
    assert "resumes from its checkpoint" in again.out
    assert "processes was 2 and is 1" in again.err
    metrics = json.loads((place / "out" / "metrics.json").read_text())
    assert metrics["steps"] == 400


Tuned = tuple[list[str], str, Path]
"""The command line of a run, its output and its folder."""


@pytest.fixture(scope="module")
def tuned_by_two(digits: TrainedDigits, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A run of two processes on the real digits: its command line, output and folder."""
    folder = tmp_path_factory.mktemp("two")
    held_out = digits.held_out
    np.savez(folder / "test.npz", images=held_out.images, labels=held_out.labels)
    words = [
        *("quantize", "gdfq.demo:DigitsNetwork"),
        *(f"--weights={digits.weights}", "--input=1x8x8", f"--test={folder}/test.npz"),
        *(f"--mean={demo.PREPROCESSING.mean[0]}", f"--std={demo.PREPROCESSING.std[0]}"),
        *("--bits=w4a4", "--recipe=quick", "--steps=100", "--no-onnx", "--no-report"),
    ]
    command = torchrun(2, "-m", "gdfq", *words, f"--out={folder}/out")
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return words, done.stdout, folder / "out"


@pytest.mark.check
def test_two_processes_write_one_run(tuned_by_two: Tuned) -> None:
    _, printed, out = tuned_by_two
    assert printed.count("layers quantized") == 1
    history = (out / "history.jsonl").read_text().splitlines()
    tuned = [json.loads(line)["step"] for line in history if '"tune"' in line]
    assert tuned
    assert tuned == sorted(set(tuned))


@pytest.mark.check
def test_two_processes_tune_as_well_as_one(tuned_by_two: Tuned, tmp_path: Path) -> None:
    """Accuracy on the real digits that are held out."""
    words, _, out = tuned_by_two
    assert main([*words, f"--out={tmp_path}/one"]) == 0
    one, two = (
        json.loads((folder / "metrics.json").read_text())["student"]["top1"]
        for folder in (tmp_path / "one", out)
    )
    # Rounding alone may part them: at 3 bits by up to 3.7, no less than two seeds.
    assert two == pytest.approx(one, abs=2.0)
