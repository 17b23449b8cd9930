"""Kills runs at random moments and compares what they end with to a run that nobody killed.

    python -m benchmarks.reliability            # 50 kills, writes results/reliability.json
    python -m benchmarks.reliability --kills 4  # fewer

Each case is a whole `gdfq quantize` on the digits network of `gdfq demo`, one thread, in a process
of its own (forked from one that has imported torch), with a checkpoint every half second at most;
the first case also exports, gathers evidence and reports. A run is killed with SIGKILL at a random
moment of the undisturbed run's time, started again with the same command, and killed at another
such moment unless it ended before; then it may finish. Every finished run must have the same bytes
of weights, examples, ONNX file and history, and the same metrics (times excepted), as the
undisturbed run. The cost is the share of the undisturbed run's time that its checkpoints took, at
the default interval.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from support.places import RESULTS

from gdfq.cli import main as gdfq_main
from gdfq.demo import PREPROCESSING, load_digits, train

FILE = RESULTS / "reliability.json"
CASES = {
    "fast-like (pool, learned grids)": ["--recipe", "quick", "--steps", "60"],
    "paper-like (generator, min-max)": [
        "--recipe",
        "paper",
        "--steps",
        "60",
        "--no-onnx",
        "--no-report",
    ],
    "genie-like (reconstruction)": [
        "--recipe",
        "genie",
        "--steps",
        "30",
        "--no-onnx",
        "--no-report",
    ],
}
FILES = ("student.safetensors", "student.onnx", "examples.npz", "history.jsonl")


def command(place: Path, out: Path, case: str, every: float) -> list[str]:
    mean, std = PREPROCESSING.mean[0], PREPROCESSING.std[0]
    return [
        *("quantize", "gdfq.demo:DigitsNetwork", "--weights", str(place / "digits.safetensors")),
        *("--test", str(place / "test.npz"), "--input", "1x8x8"),
        *("--mean", str(mean), "--std", str(std), "--out", str(out)),
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
    files = [folder / name for name in FILES if (folder / name).exists()]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["seconds"]
    metrics.get("export", {}).pop("seconds", None)
    text = json.dumps(metrics, sort_keys=True)
    return {**found, "metrics": hashlib.sha256(text.encode()).hexdigest()[:16]}


def run(words: list[str], log: Path) -> None:
    """The command, in this process, which says what it says into a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    sys.exit(gdfq_main(words))


def attempt(words: list[str], log: Path, seconds: float | None) -> tuple[bool, str, float]:
    """Run until it ends or the moment has come: whether it ended, its last line, seconds."""
    started = time.monotonic()
    process = multiprocessing.get_context("forkserver").Process(target=run, args=(words, log))
    process.start()
    process.join(seconds)
    killed = process.is_alive()
    process.kill()
    process.join()
    said = log.read_text() if log.exists() else ""
    if not killed and process.exitcode:
        raise SystemExit(f"{words} ended with {process.exitcode}:\n{said}")
    return not killed, (said.splitlines() or ["start"])[-1], time.monotonic() - started


def stage_of(line: str) -> str:
    """Where a killed run was, from the last line that it printed: `stage step/steps ...`."""
    found = re.match(r"(\w+) (\d+)/(\d+) ", line)
    if found is None:
        return "start"
    # Behind the last image of the student's test nothing is printed.
    over = found[1] == "evaluate" and found[2] == found[3]
    return "export" if over else found[1]


def disturbed(
    place: Path, case: str, whole: float, draw: random.Random, kills: int
) -> dict[str, Any]:
    """One run, killed again and again, at most `kills` times."""
    folder = place / "disturbed"
    stages: list[str] = []
    shutil.rmtree(folder, ignore_errors=True)
    while True:
        wait = draw.uniform(0, whole) if len(stages) < kills else None
        ended, line, _ = attempt(command(place, folder, case, 0.5), place / "log", wait)
        if ended or (folder / "metrics.json").exists():  # all but the report's page is there
            return {"stages": stages, "outcome": outcome(folder)}
        stages.append(stage_of(line))
        print(f"  killed after {wait:.1f} s, in {stages[-1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    multiprocessing.set_forkserver_preload(["gdfq.cli.quantize", "onnxscript"])
    draw = random.Random(options.seed)  # noqa: S311 (no secret)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        prepare(place)
        for index, case in enumerate(CASES):
            print(case, flush=True)
            out = place / f"whole{index}"
            _, _, seconds = attempt(command(place, out, case, 60), place / "log", None)
            expected = outcome(out)
            runs: list[dict[str, Any]] = []
            took = json.loads((out / "metrics.json").read_text())["seconds"]
            share = -(-options.kills * (index + 1) // len(CASES)) - sum(
                len(r["stages"]) for r in rows
            )
            while (left := share - sum(len(run["stages"]) for run in runs)) > 0:
                runs.append(disturbed(place, case, seconds, draw, min(left, 2)))
            stages = [stage for run in runs for stage in run["stages"]]
            same = sum(run["outcome"] == expected for run in runs)
            rows.append({"case": case, "seconds": round(seconds, 1), "stages": stages,
                         "runs": len(runs), "same": same, "outcome": expected,
                         "checkpoints": took["checkpoints"], "of": took["total"]})  # fmt: skip
            print(f"  {len(stages)} kills, {len(runs)} runs finished, {same} the same", flush=True)
            for run in runs:
                other = [name for name in expected if run["outcome"].get(name) != expected[name]]
                if other:
                    print(f"  different after kills in {run['stages']}: {other}", flush=True)
            FILE.write_text(json.dumps({"seed": options.seed, "rows": rows}, indent=1) + "\n")
    print(table(rows))


def table(rows: list[dict[str, object]]) -> str:
    """The rows as docs/reliability.md has them."""
    lines = [
        "| case | kills | where | runs finished | the same | checkpoints, of the time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        stages: list[str] = row["stages"]  # type: ignore[assignment]
        where = ", ".join(f"{stage} {stages.count(stage)}" for stage in dict.fromkeys(stages))
        cost = f"{row['checkpoints']:.2f} of {row['of']:.0f} s"
        cells = (row["case"], len(stages), where, row["runs"], row["same"], cost)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
