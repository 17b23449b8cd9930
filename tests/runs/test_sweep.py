"""Sweeps: what a file may say, which commands come of it, and that they run, fail and go on."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdfq.cli import main
from gdfq.errors import UsageError
from gdfq.runs.sweep import Network, Sweep, read_sweep
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
def place(tmp_path):
    (tmp_path / "net.py").write_text(NETWORK)
    images = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), np.uint8)
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(12) % 3)
    return tmp_path


def written(folder: Path, text: str) -> Path:
    file = folder / "sweep.yaml"
    file.write_text(text)
    return file


def read(folder: Path, text: str) -> Sweep:
    return read_sweep(written(folder, text))


def silent(*_):
    pass


def test_a_grid_has_every_combination_once(tmp_path):
    sweep = read(
        tmp_path,
        """
        networks:
          - a.py:net
          - {model: "ptcv:b", name: b, input: [3, 32, 32], classifier: false, size: 300KB}
        bits: [w4a4, w8a8]
        recipes: quick
        layer_bits: [[], [first=8, last=float]]
        seeds: [0, 1, 1]
        steps: 40
        """,
    )
    cells = sweep.cells()
    assert len(cells) == 2 * 2 * 2 * 2
    assert len({cell.folder for cell in cells}) == len(cells)
    assert cells[0].words() == [
        "--bits=w4a4", "--recipe=quick", "--steps=40", "--seed=0", "--", "a.py:net",
    ]  # fmt: skip
    assert cells[-1].words() == [
        "--input=3x32x32", "--no-classifier", "--bits=w8a8", "--recipe=quick", "--layer-bits=first=8",
        "--layer-bits=last=float", "--steps=40", "--seed=1", "--", "ptcv:b",
    ]  # fmt: skip
    assert cells[-1].folder.startswith("b-w8a8-quick-first=8-last=float-seed1-")


def test_a_changed_option_is_another_folder():
    one, other = (Sweep((Network("a.py:n", mean=mean),)).cells()[0] for mean in ("0", "0.5"))
    assert one.folder[:-8] == other.folder[:-8]
    assert one.folder != other.folder


def test_a_size_is_given_to_chosen_widths_alone():
    cells = Sweep((Network("a.py:n", size="9KB"),), bits=("auto", "w4a4")).cells()
    assert [("--size=9KB" in cell.words()) for cell in cells] == [True, False]


def test_a_model_cannot_be_an_option():
    assert Sweep((Network("--out=/elsewhere"),)).cells()[0].words()[-2:] == [
        "--",
        "--out=/elsewhere",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("networks: [a]\nbit: w4a4", "line 2: a sweep has no 'bit'. It has networks, bits"),
        ("networks:\n  - {model: a}\n  - {modle: b}", "line 3: a network has no 'modle'"),
        ("networks: [a]\nseeds: [0]\nseeds: [1]", "line 3: seeds is given twice"),
        ("networks: [a\nseeds: 1", "line 2"),
        ("- a", "no mapping"),
        ("", "no mapping"),
        ("bits: w4a4", "must list its networks"),
        ("networks: []", "networks must have one value at least"),
        ("networks: [{name: a}]", "must have a model"),
        ("networks: [a]\nbits: w9a9", "2 to 8 bits; got 9"),
        ("networks: [a]\nbits: auto", "bits auto needs a size"),
        ("networks: [a]\nrecipes: fats", "there is no recipe 'fats'"),
        ("networks: [a]\nlayer_bits: [first]", "PATTERN=float"),
        ("networks: [a]\nplacement: t2", "placement must be one of relu, full; got 't2'"),
        ("networks: [a]\nseeds: [one]", "seeds must be whole numbers, at least 0; got 'one'"),
        ("networks: [a]\nseeds: [true]", "got True"),
        ("networks: [a]\nsteps: 1.5", "steps must be whole numbers"),
        ("networks: [a]\nsteps: 1", "needs at least 4"),
        ("networks: [{model: a, classifier: maybe}]", "classifier must be true or false"),
        ("networks: [{model: a, test: {b: c}}]", "test must be text or a number"),
        ("networks: [a]\nseeds: 2024-99-99", "valid YAML"),
        ("networks: [!!python/object/apply:os.getcwd []]", "valid YAML"),
        ("!!set {networks}", "no mapping"),
        ("networks: [{model: a, !!binary name: b}]", "line 1: a network has no 'name'"),
        ("networks: &n [a]\nbits: *n", "line 2: a sweep has no aliases"),
        (
            "networks: [a]\nlayer_bits: " + "[" * 10**5,
            "line 2: a sweep has lists and mappings in one another 8 deep at most",
        ),
        (
            f"networks: [a]\nseeds: {list(range(101))}\nsteps: 1\nbits: {['w4a4'] * 100}",
            "at most 10000 runs; this one has 10100",
        ),
        ("networks: [a]\n" + "#" * 2**20, "1048576 bytes at most"),
    ],
)
def test_what_no_sweep_can_be_is_said(tmp_path, text, said):
    with pytest.raises(UsageError) as raised:
        read(tmp_path, text)
    assert said in str(raised.value)
    assert "sweep.yaml" in str(raised.value)
    assert len(str(raised.value)) < 500


def test_a_file_that_cannot_be_read_is_said(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_sweep(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"networks: [\xff]")
    with pytest.raises(UsageError, match="cannot be read"):
        read_sweep(tmp_path / "latin.yaml")


_KEYS = st.sampled_from(
    ["networks", "bits", "seeds", "layer_bits", "steps", "model", "test", "size"]
)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | _KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(_KEYS, _VALUES, max_size=4).map(json.dumps) | st.text(max_size=60))
def test_any_file_is_a_sweep_or_a_clear_error(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "any.yaml"  # JSON is YAML
    file.write_text(text, encoding="utf-8", errors="replace")
    with contextlib.suppress(UsageError):
        assert read_sweep(file).cells()


def test_a_sweep_runs_records_a_failure_and_is_not_run_twice(place, capsys):
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


def test_a_sweep_that_was_ended_goes_on(place):
    """Its run is stopped with it, and run again."""
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


def test_a_killed_run_is_told_by_its_signal(place):
    (place / "net.py").write_text("import os\ndef small():\n    os.kill(os.getpid(), 9)\n")
    sweep = Sweep((Network("net.py:small", input="1x8x8"),))
    (row,) = run_sweep(sweep, place / "out", home=place, jobs=1, tell=silent)
    assert row.status == "failed"
    assert "SIGKILL" in row.error


def test_the_table_has_mean_and_deviation_over_seeds():
    def row(seed: int, top1: float | None, status: str = "finished") -> Row:
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


def test_jobs_and_threads_must_be_some(place):
    with pytest.raises(UsageError, match="at least 1; got 0"):
        run_sweep(Sweep((Network("a"),)), place / "out", home=place, jobs=0, tell=silent)


def test_threads_come_from_the_sweep(place):
    (place / "net.py").write_text(
        "import os, pathlib\ndef small():\n"
        "    pathlib.Path('seen').write_text(os.environ['OMP_NUM_THREADS'])\n"
    )
    sweep = Sweep((Network("net.py:small", input="1x8x8"),))
    run_sweep(sweep, place / "out", home=place, jobs=1, threads=3, tell=silent)
    assert (place / "seen").read_text() == "3"
    assert os.environ.get("OMP_NUM_THREADS") != "3"
