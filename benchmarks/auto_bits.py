"""Bit widths chosen by `--bits auto` compared with uniform ones in files of the same size.

    python -m benchmarks.auto_bits                          # all of PLAN that is not there yet
    python -m benchmarks.auto_bits --networks cifar10_resnet20 --seeds 0 1 2

Activations have 8 bits in all rows, so that widths of weights alone are compared; placement is
`full`, the recipe `quick`. Each budget is a multiple of the size of a uniform file, up to the next
whole KB, and its rival the most accurate uniform width that fits: that file, because 3 bits take as
much as 4, and 5 as much as 8. Sizes are those of the ONNX files, without accuracy in their metadata.

Rows go to benchmarks/results/auto_bits.json as soon as they are done, and the table to
benchmarks/results/auto_bits.md. No run selects anything by accuracy.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from benchmarks.accuracy import Row, compared, hash_of, stored, tested
from benchmarks.trained_networks import NETWORKS
from support.narrowing import instance
from support.places import RESULTS, SHARED

from gdfq import pipeline
from gdfq.analysis.bit_allocation import choose_bits, onnx_sizes
from gdfq.deploy.card import Card
from gdfq.deploy.metadata import metadata_of
from gdfq.deploy.onnx.writer import to_onnx
from gdfq.execution.context import Context
from gdfq.execution.listeners import Terminal
from gdfq.execution.malloc import keep_freed_memory_
from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured, capture
from gdfq.plan.plan import Plan
from gdfq.recipes import QUICK, Recipe
from gdfq.sources.pool import ImagePool, StoredImages
from gdfq.student.scheme import Scheme

FILE = RESULTS / "auto_bits.json"
STEPS = {"imagenet_mobilenetv1_025": 40}
"""Where the recipe's own would take too long."""
BUDGETS = {"w2a8": (1.0, 1.3), "w4a8": (1.0, 1.3)}
"""Multiples of the uniform widths' sizes."""
SEEDS = (0, 1, 2)


def run(
    name: str, teacher: Captured, recipe: Recipe, scheme: Scheme, seed: int, listener: Terminal
) -> dict[str, Any]:
    """Bytes and accuracy of the scheme's student."""
    network = NETWORKS[name]
    started = time.perf_counter()
    plan = Plan(teacher, scheme, recipe, recipe.source, network.preprocessing)
    student = pipeline.run(plan, Context(seed=seed, listener=listener)).network
    seconds = time.perf_counter() - started
    card = card_of(name, teacher, scheme, recipe, seed)
    data = to_onnx(student, teacher.inputs, metadata_of(card, {}, safe=False))
    facts = compared(*tested(student, teacher, network.test, network.preprocessing))
    return {
        "bytes": len(data), "top1": facts["student"]["all"], "teacher": facts["teacher"]["all"],
        "drop_interval": facts["drop_interval"], "seconds": round(seconds, 1),
    }  # fmt: skip


def card_of(name: str, teacher: Captured, scheme: Scheme, recipe: Recipe, seed: int) -> Card:
    return Card(
        inputs=teacher.inputs,
        classes=teacher.classes,
        outputs=teacher.outputs,
        preprocessing=NETWORKS[name].preprocessing,
        bits=scheme.bits,
        placement=scheme.placement,
        recipe=recipe.name,
        seed=seed,
        layer_bits=tuple(map(str, scheme.layer_bits)),
    )


def rows_of(
    name: str, seed: int, known: Mapping[tuple[str, int, str], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The rows of a network and seed: uniform ones, then one a budget."""
    network = NETWORKS[name]
    teacher = capture(network.load(), torch.zeros(1, *network.shape))
    recipe = replace(QUICK.with_steps(STEPS.get(name)), placement="full")
    common: dict[str, Any] = {
        "network": name,
        "seed": seed,
        "steps": recipe.steps,
        "code": hash_of("**/*.py"),
    }
    with Terminal() as listener:
        recipe, _ = stored(recipe, teacher, Row(name, "", "full", recipe.name, seed), listener)
        assert isinstance(recipe.source, ImagePool)
        images = instance(recipe.source.source, StoredImages).images
        for bits, multiples in BUDGETS.items():
            row = known.get((name, seed, bits))
            if row is None:
                scheme = Scheme(Bits.parse(bits), "full")
                row = common | {"bits": bits} | run(name, teacher, recipe, scheme, seed, listener)
            yield row
            size = row["bytes"]
            for multiple in multiples:
                title = f"auto, {multiple} x {bits}"
                if (row := known.get((name, seed, title))) is not None:
                    yield row
                    continue
                base = Scheme(Bits(4, 8), "full")
                card = card_of(name, teacher, base, recipe, seed)
                started = time.perf_counter()
                sizes = onnx_sizes(teacher, base, metadata_of(card, {}, safe=False))
                # The least that can be promised, which lies a little above the smallest file.
                least = sum(min(group.values()) for group in sizes.groups)
                budget = 1000 * -(-max(int(multiple * size), least) // 1000)
                chosen = choose_bits(teacher, base, images, budget, sizes, listener=listener)
                choosing = time.perf_counter() - started
                row = run(name, teacher, recipe, chosen.scheme, seed, listener)
                yield common | {
                    "bits": title, "rival": bits, "budget": budget, **row,
                    "seconds_choosing": round(choosing, 1), "widths": chosen.bits,
                }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS)[:1])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    keep_freed_memory_()
    if not SHARED.is_dir():
        sys.exit(f"skipped: the networks and images of {SHARED} are not there")
    done = json.loads(FILE.read_text()) if FILE.exists() else []
    rows = {(row["network"], row["seed"], row["bits"]): row for row in done}
    for name in options.networks:
        for seed in options.seeds:
            for row in rows_of(name, seed, dict(rows)):
                rows[row["network"], row["seed"], row["bits"]] = row
                FILE.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
                FILE.with_suffix(".md").write_text(table(list(rows.values())))
                print(name, seed, row["bits"], row["bytes"], row["top1"], flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Return each auto row next to the uniform row of the same size, in markdown."""
    uniform = {(row["network"], row["seed"], row["bits"]): row for row in rows}
    lines = [
        "| network | seed | budget | uniform, same activations | auto | difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "rival" not in row:
            continue
        rival = uniform[row["network"], row["seed"], row["rival"]]
        gain = row["top1"] - rival["top1"]
        lines.append(
            f"| {row['network']} | {row['seed']} | {row['budget'] // 1000} KB "
            f"| {rival['bits']}: {rival['bytes']:,} bytes, {rival['top1']:.2f} % "
            f"| {row['bytes']:,} bytes, {row['top1']:.2f} % | {gain:+.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
