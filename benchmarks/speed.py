"""Where the time of one `paper` step goes: a table, and benchmarks/results/speed.json.

    python -m benchmarks.speed [--threads 2] [--batch 200] [--rounds 7]
    python -m benchmarks.speed --scale      # instead: networks of usual size, see scale.py

CIFAR-10 ResNet-20 (random weights: time does not depend on them). All variants are measured in
turn in one process, round by round, so that drift of the machine's speed hits them alike; the
table gives medians and, in brackets, the fastest and slowest round.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from benchmarks.scale import in_channels_last
from benchmarks.scale import main as measure_scale
from benchmarks.timing import measure
from benchmarks.unix import peak_resident_mib
from support.narrowing import instance
from support.places import RESULTS
from support.real_networks import cifar10_resnet20
from torch import Tensor

from gdfq.execution.seeding import stream
from gdfq.functional.grid import Bits
from gdfq.functional.losses import batch_norm_statistics_loss
from gdfq.functional.moments import input_moments
from gdfq.functional.upsample_conv import upsampled_convolution
from gdfq.graph.capture import capture
from gdfq.graph.statistics import StatisticsNetwork
from gdfq.quantizers.family import LSQ
from gdfq.recipes import FAST, PAPER
from gdfq.sources.base import Batch
from gdfq.sources.generator import Generator, GeneratorSource
from gdfq.sources.pool import ImagePool
from gdfq.sources.spectral import SpectralSource
from gdfq.student.build import build_student
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_
from gdfq.tuning.distill import Distillation, tune_


def by_sum(x: Tensor) -> tuple[Tensor, Tensor]:
    columns = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    mean = columns.mean(0)
    return mean, (columns - mean).square().mean(0)


def by_var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return mean, variance


def by_matmul(x: Tensor) -> tuple[Tensor, Tensor]:
    columns = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    ones = columns.new_full((1, len(columns)), 1 / len(columns))
    mean = (ones @ columns)[0]
    return mean, (ones @ columns.square())[0] - mean.square()


def hooked(
    model: torch.nn.Module,
    x: Tensor,
    formula: Callable[[Tensor], tuple[Tensor, Tensor]],
    stored: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """The statistics loss with module hooks and the given formula for the moments."""
    seen = []
    handles = [
        m.register_forward_pre_hook(lambda _, inputs: seen.append(formula(inputs[0])))
        for m in model.modules()
        if isinstance(m, torch.nn.BatchNorm2d)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return batch_norm_statistics_loss(seen, stored)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--scale", nargs="?", const="", metavar="WORD",
        help="measure networks of usual size instead, or those whose name contains WORD",
    )  # fmt: skip
    options = parser.parse_args()
    if options.scale is not None:
        measure_scale(options.scale)
        return
    torch.set_num_threads(options.threads)

    model = in_channels_last(cifar10_resnet20().eval().requires_grad_(False))
    teacher = capture(model, torch.zeros(1, 3, 32, 32))
    network = StatisticsNetwork(teacher)
    random = stream(0, "speed")
    images = torch.randn(options.batch, 3, 32, 32, generator=random)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (options.batch,), generator=random)
    leaf = images.clone().requires_grad_()
    z = torch.randn(options.batch, 100, generator=random)
    generator = Generator(
        (3, 32, 32), 10, latent=100, conditioning="label-embedding", random=random
    )
    student = build_student(teacher, Scheme(Bits(4, 4), "relu"))
    logits = teacher.network(images)
    batch = Batch((images,), labels, logits)
    calibrate_(student, [batch], steps=1)
    tuning, fast_tuning = (instance(recipe.tuning, Distillation) for recipe in (PAPER, FAST))

    def plain_loss() -> Tensor:
        return F.cross_entropy(teacher.network(leaf), labels)

    def with_statistics() -> Tensor:
        output, seen = network(leaf)
        return F.cross_entropy(output, labels) + 0.1 * batch_norm_statistics_loss(
            seen, network.stored
        )

    def generate() -> Tensor:
        return generator(z, labels)

    def generator_gradients() -> None:
        generate().backward(images)
        generator.zero_grad()

    def tune_once() -> None:
        tune_(student, teacher, [batch], tuning, first_step=0, total_steps=1)

    learner = build_student(teacher, Scheme(Bits(4, 4), "relu"), quantizers=LSQ)
    calibrate_(learner, [batch], steps=1)

    def five_fast_updates() -> None:
        batches = [Batch((images,), labels, None)] * 5
        tune_(learner, teacher, batches, fast_tuning, first_step=0, total_steps=5)

    spectral = instance(instance(FAST.source, ImagePool).source, SpectralSource)
    spectral = replace(spectral, batch=options.batch, iterations=5)

    def five_spectral_iterations() -> None:
        next(spectral.stream(teacher, steps=1))

    config = replace(instance(PAPER.source, GeneratorSource), batch=options.batch)
    source = config.stream(teacher, steps=10**6)

    def whole_step() -> None:
        tune_(student, teacher, islice(source, 1), tuning, first_step=0, total_steps=1)  # fmt: skip

    float_model = in_channels_last(cifar10_resnet20().train())
    float_optimizer = tuning.optimizer.build(float_model)

    def float_step() -> None:
        float_optimizer.zero_grad()
        F.cross_entropy(float_model(images), labels).backward()
        float_optimizer.step()

    enlarged = (
        torch.randn(options.batch, 128, 16, 16)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
    )
    kernel = (
        torch.randn(64, 128, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    )
    bias = torch.zeros(64, requires_grad=True)

    def convolve(fast: bool) -> None:
        if fast:
            y = upsampled_convolution(enlarged, kernel, bias)
        else:
            y = F.conv2d(F.interpolate(enlarged, scale_factor=2), kernel, bias, padding=1)
        torch.autograd.grad(y, (enlarged, kernel, bias), torch.ones_like(y))

    formulas: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
        "naive mean and variance": by_sum,
        "var_mean": by_var_mean,
        "matmul": by_matmul,
        "own moments": input_moments,
    }

    def hooked_gradient(formula: Callable[[Tensor], tuple[Tensor, Tensor]]) -> object:
        return torch.autograd.grad(hooked(model, leaf, formula, network.stored), leaf)

    jobs: dict[str, Callable[[], object]] = {
        "whole paper step": whole_step,
        "plain float training step": float_step,
        "generator: forward": lambda: generate().detach(),
        "generator: forward, backward": generator_gradients,
        "teacher: forward": lambda: teacher.network(images),
        "teacher: forward, backward": lambda: torch.autograd.grad(plain_loss(), leaf),
        "teacher: the same with statistics": lambda: torch.autograd.grad(with_statistics(), leaf),
        "student: one update": tune_once,
        "fast: five updates, teacher's features included": five_fast_updates,
        "fast: five iterations on the images": five_spectral_iterations,
        "up x2 and 3x3: as written": lambda: convolve(False),
        "up x2 and 3x3: phases": lambda: convolve(True),
        **{
            f"statistics by hooks, {name}": partial(hooked_gradient, formula)
            for name, formula in formulas.items()
        },
    }  # fmt: skip
    times = measure(jobs, options.rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name:48}{medians[name]:8.0f} ms  [{min(values):.0f}, {max(values):.0f}]")
    plain, both = (
        times[f"teacher: {n}"] for n in ("forward, backward", "the same with statistics")
    )
    ratio = statistics.median(b / a - 1 for a, b in zip(plain, both, strict=True))
    print(f"{'statistics / teacher forward and backward':48}{100 * ratio:8.0f} %")
    peak = peak_resident_mib()
    print(f"{'peak memory of this process':48}{peak:8.0f} MiB")
    RESULTS.mkdir(exist_ok=True)
    document = {
        "threads": options.threads, "batch": options.batch, "rounds": options.rounds,
        "torch": torch.__version__, "median_ms": medians, "ms": times,
        "statistics_share": ratio, "peak_mib": peak,
    }  # fmt: skip
    (RESULTS / "speed.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
