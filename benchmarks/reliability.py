"""Kills runs at random moments and compares what they end with to a run that nobody killed.

    python benchmarks/reliability.py            # 50 kills, writes results/reliability.json
    python benchmarks/reliability.py --kills 4  # fewer

Each case is a whole `gdfq quantize` on the digits network of `gdfq demo`, one thread, in a process of
its own, with a checkpoint every half second at most. A run is killed with SIGKILL at a random moment
after its start, started again with the same command, killed again, until an attempt ends before its
moment has come; then the next run begins. Every finished run must have the same bytes of weights,
examples, ONNX file and history, and the same metrics (times excepted), as the undisturbed run.
The cost is the share of the undisturbed run's time that its checkpoints took, at the default interval
and at the shortest that is allowed (0).
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from gdfq.demo import PREPROCESSING, load_digits, train

RESULTS = Path(__file__).parent / "results" / "reliability.json"
CASES = {
    "fast-like (pool, learned grids)": ["--recipe", "quick", "--steps", "60"],
    "paper-like (generator, min-max)": ["--recipe", "paper", "--steps", "60"],
    "genie-like (reconstruction)": ["--recipe", "genie", "--steps", "30"],
}
FILES = ("student.safetensors", "student.onnx", "examples.npz", "history.jsonl")


def command(place: Path, out: Path, case: str, every: float) -> list[str]:
    mean, std = PREPROCESSING.mean[0], PREPROCESSING.std[0]
    return [
        *(sys.executable, "-m", "gdfq", "quantize", "gdfq.demo:DigitsNetwork"),
        *("--weights", str(place / "digits.safetensors"), "--test", str(place / "test.npz")),
        *("--input", "1x8x8", "--mean", str(mean), "--std", str(std), "--out", str(out)),
        *("--checkpoint-every", str(every), *CASES[case]),
    ]


def prepare(place: Path) -> None:
    """Weights and test images, as files."""
    training, held_out = load_digits()
    state = train(training).state_dict()
    save_file(
        {name: value.contiguous() for name, value in state.items()}, place / "digits.safetensors"
    )
    np.savez(place / "test.npz", images=held_out.images.numpy(), labels=held_out.labels.numpy())


def outcome(folder: Path) -> dict[str, str]:
    """Hashes of what a finished run holds."""
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in FILES}
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["seconds"], metrics["export"]["seconds"]
    text = json.dumps(metrics, sort_keys=True)
    return {**found, "metrics": hashlib.sha256(text.encode()).hexdigest()[:16]}


def attempt(words: list[str], log: Path, seconds: float | None) -> tuple[int, str, float]:
    """Run until it ends or the moment has come: exit code, last line it printed, seconds."""
    started = time.monotonic()
    with log.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(words, stdout=file, stderr=file, env=environment)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    lines = log.read_text().splitlines() or ["nothing yet"]
    return process.returncode, lines[-1], time.monotonic() - started


def stage_of(line: str, folder: Path) -> str:
    """Where a killed run was, from the last line that it printed."""
    word = line.split(" ", 1)[0]
    known = {"images", "calibrate", "warmup", "tune", "evaluate", "generator"}
    if word in known:
        return word
    return "export" if (folder / "student.safetensors").exists() else "start"


def disturbed(
    place: Path, case: str, whole: float, draw: random.Random, kills: int
) -> dict[str, object]:
    """One run, killed again and again, at most `kills` times."""
    folder, stages = place / "disturbed", []
    shutil.rmtree(folder, ignore_errors=True)
    while True:
        wait = draw.uniform(0, whole) if len(stages) < kills else None
        code, line, _ = attempt(command(place, folder, case, 0.5), place / "log", wait)
        if code == 0:
            return {"stages": stages, "outcome": outcome(folder)}
        if code != -signal.SIGKILL:
            raise SystemExit(
                f"{case}: an attempt failed with {code}:\n{(place / 'log').read_text()}"
            )
        stages.append(stage_of(line, folder))
        print(f"  killed after {wait:.1f} s, in {stages[-1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)  # noqa: S311 (no secret)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        prepare(place)
        for index, case in enumerate(CASES):
            print(case, flush=True)
            out = place / f"whole{index}"
            code, _, seconds = attempt(command(place, out, case, 60), place / "log", None)
            if code:
                raise SystemExit(f"{case} failed: {(place / 'log').read_text()}")
            expected, runs = outcome(out), []
            share = -(-options.kills * (index + 1) // len(CASES)) - sum(
                len(r["stages"]) for r in rows
            )
            while (left := share - sum(len(run["stages"]) for run in runs)) > 0:
                runs.append(disturbed(place, case, seconds, draw, left))
            stages = [stage for run in runs for stage in run["stages"]]
            same = sum(run["outcome"] == expected for run in runs)
            rows.append({"case": case, "seconds": round(seconds, 1), "stages": stages,
                         "runs": len(runs), "same": same, "outcome": expected})  # fmt: skip
            print(f"  {len(stages)} kills, {len(runs)} runs finished, {same} the same", flush=True)
            RESULTS.write_text(json.dumps({"seed": options.seed, "rows": rows}, indent=1) + "\n")
    print(
        "\n| case | seconds | kills | in | runs finished | the same |\n| --- | --- | --- | --- | --- | --- |"
    )
    for row in rows:
        stages = row["stages"]
        counts = ", ".join(f"{stage} {stages.count(stage)}" for stage in dict.fromkeys(stages))
        print(
            f"| {row['case']} | {row['seconds']} | {len(stages)} | {counts} | {row['runs']} | {row['same']} |"
        )


if __name__ == "__main__":
    main()
