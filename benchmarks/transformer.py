"""Accuracy of a small transformer, which has no batch norm, after data-free quantization.

    python -m benchmarks.transformer

Trains the tests' Transformer on half of scikit-learn's digits, quantizes it with recipe `patches`
(128 images, 60 steps, placement full) from three seeds, and measures on the other half.
"""

import argparse
import statistics
from dataclasses import replace

import torch
from support import networks
from support.narrowing import instance

import gdfq
from gdfq import demo
from gdfq.execution.context import Context
from gdfq.graph.capture import capture
from gdfq.recipes import find_recipe
from gdfq.sources.pool import ImagePool

SEEDS = (0, 1, 2)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    training, held_out = demo.load_digits()
    model = networks.trained_transformer(demo.PREPROCESSING(training.images), training.labels)
    example = torch.zeros(1, *networks.Transformer.SHAPE)
    teacher = capture(model, example)
    recipe = find_recipe("patches").with_steps(60)
    pool = replace(instance(recipe.source, ImagePool), images=128)
    pools = {seed: pool.made(teacher, context=Context(seed=seed))[0] for seed in SEEDS}
    print("| widths | full precision | top-1 by seed | mean |\n| --- | --- | --- | --- |")
    for bits in ("w8a8", "w4a8", "w4a4"):
        found = []
        for seed, images in pools.items():
            quantized = gdfq.quantize(
                teacher,
                example,
                bits,
                replace(recipe, source=images),
                seed=seed,
                test=(held_out.images, held_out.labels),
                mean=demo.PREPROCESSING.mean,
                std=demo.PREPROCESSING.std,
            )
            found.append(quantized.metrics["student"]["top1"])
        full = quantized.metrics["teacher"]["top1"]
        by_seed = ", ".join(f"{top1:.2f}" for top1 in found)
        print(f"| {bits} | {full:.2f} | {by_seed} | {statistics.mean(found):.2f} |", flush=True)


if __name__ == "__main__":
    main()
