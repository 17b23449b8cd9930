"""What a language model of realistic width costs: time and memory by layers, and outlier channels.

    python -m benchmarks.language_memory                  # every row that is not there yet
    python -m benchmarks.language_memory --layers 2 4 --equalizers hadamard
    python -m benchmarks.language_memory --table

A Llama in plain PyTorch with random weights: width 512, 8 heads, 1,376 hidden channels, vocabulary
4,096. In front of each group of linear layers six channels are multiplied by 30, and the columns
that read them divided by it, so that the function stays and its activations have outliers. Recipe
`text-quick` at w4a8 on 64 given sequences of 64 random tokens; the KL is that of 32 sequences of 16
tokens of the model's own text. Each row is a process of its own, on one thread: seconds of CPU, and
the highest resident size (VmHWM) during the fit beyond what the process held before the run. Linux
only. Rows are kept in results/language_memory.json.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from benchmarks.memory import Meter
from benchmarks.rows import complete
from support.language_model import Block, Sizes, TinyLanguageModel, tiny_model, tokens, vocabulary
from support.places import RESULTS, ROOT
from torch import nn

import gdfq
from gdfq.equalizers.named import EQUALIZERS
from gdfq.execution.malloc import keep_freed_memory_
from gdfq.recipes import TEXT_QUICK
from gdfq.sources.own_text import OwnText, Sampling

FILE = RESULTS / "language_memory.json"
LAYERS = (2, 4, 8)
WIDE = Sizes(vocabulary=4096, width=512, hidden=1376, heads=8, length=128)
OUTLIERS, FACTOR = 6, 30.0
SEQUENCES, LENGTH, OWN_LENGTH, BITS = 64, 64, 16, "w4a8"


def with_outliers(model: TinyLanguageModel) -> TinyLanguageModel:
    """Plant outlier channels between each norm and the layers behind it; the function stays."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in model.blocks:
            assert isinstance(block, Block)
            attention, gated = block.attention, block.gated
            _plant_(block.norm, (attention.q, attention.k, attention.v), draw)
            _plant_(block.second_norm, (gated.gate, gated.up), draw)
    return model


def _plant_(norm: nn.Module, layers: Sequence[nn.Linear], draw: torch.Generator) -> None:
    weight = norm.get_parameter("weight")
    channels = torch.randperm(len(weight), generator=draw)[:OUTLIERS]
    weight[channels] *= FACTOR
    for layer in layers:
        layer.weight[:, channels] /= FACTOR


def measured(layers: int, equalizer: str) -> dict[str, Any]:
    """One row, in this process."""
    torch.set_num_threads(1)
    keep_freed_memory_()
    sizes = replace(WIDE, layers=layers)
    model = with_outliers(tiny_model(sizes))
    teacher = gdfq.capture(model, tokens(sizes), vocabulary=vocabulary(sizes))
    source = OwnText(sequences=32, batch=16, sampling=Sampling(length=OWN_LENGTH))
    recipe = replace(TEXT_QUICK, source=source, equalizer=EQUALIZERS[equalizer])
    text = tokens(sizes, count=SEQUENCES, length=LENGTH, seed=2)
    meter = Meter()
    meter.ends("before")
    found = gdfq.quantize(teacher, bits=BITS, recipe=recipe, data=text, listener=meter.hears)
    meter.ends("end")
    before = meter.stages["before"]["peak_mib"]
    stages = {name: row for name, row in meter.stages.items() if name not in {"before", "start"}}
    own = found.metrics["own_text"]
    return {
        "layers": layers,
        "equalizer": equalizer,
        "bits": BITS,
        "parameters": sum(p.numel() for p in model.parameters()),
        "float_mib": round(sum(p.nbytes for p in model.parameters()) / 2**20, 1),
        "before_mib": before,
        "beyond_mib": max(row["peak_mib"] for row in stages.values()) - before,
        "own_kl": round(own["divergence"], 5),
        "stages": stages,
        "torch": torch.__version__,
    }


def measured_alone(layers: int, equalizer: str) -> dict[str, Any]:
    """A row, by a process of its own."""
    command = [sys.executable, "-m", "benchmarks.language_memory", "--one", str(layers), equalizer]
    run = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return row


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows in markdown."""
    lines = [
        "| layers | equalizer | weights in float32, MiB | CPU seconds | MiB beyond | KL |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(found, key=lambda row: (row["layers"], row["equalizer"])):
        seconds = sum(stage["seconds"] for stage in row["stages"].values())
        figures = (row["float_mib"], f"{seconds:.0f}", row["beyond_mib"], f"{row['own_kl']:.4f}")
        lines.append(f"| {row['layers']} | {row['equalizer']} | {' | '.join(map(str, figures))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[*LAYERS])
    parser.add_argument("--equalizers", nargs="+", choices=EQUALIZERS, default=[*EQUALIZERS])
    parser.add_argument("--table", action="store_true", help="print the rows as a table, and end")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(int(options.one[0]), options.one[1])))
        return
    wanted = () if options.table else product(options.layers, options.equalizers)
    shown = ("before_mib", "beyond_mib", "own_kl")
    print(table(complete(FILE, ("layers", "equalizer"), wanted, measured_alone, shown)))


if __name__ == "__main__":
    main()
