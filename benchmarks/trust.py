"""Compares the expected accuracy drop with the measured drop of many students.

    python -m benchmarks.trust                     # the missing runs, then the fit of the law
    python -m benchmarks.trust --networks digits   # only some networks' runs

Students of several networks, bits, recipes and seeds are made. Their accuracy drop is measured on
real test images, and the inputs of `gdfq.analysis.accuracy_drop` are measured without them. The
test images are used for nothing else. One of the networks was trained with binary cross-entropy, so
its logits have a large common offset. Each run is saved to benchmarks/results/trust.json as soon as
it has finished, and is skipped if it is there. Students are stored under benchmarks/cache.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.accuracy import compared, stored
from benchmarks.trained_networks import EFFICIENTNET, MOBILE, NETWORKS, R20, R32, R56
from scipy.optimize import least_squares
from support.narrowing import instance, present
from support.places import CACHE, RESULTS, ROOT, SHARED
from torch import Tensor

from gdfq import demo, pipeline
from gdfq.analysis.accuracy import logits_of
from gdfq.analysis.accuracy_drop import (
    LAW,
    Law,
    estimate_drop,
    logit_error,
    make_images,
    mix_images,
    noise_images,
)
from gdfq.data.datasets import ArrayData, ImageData, load_data
from gdfq.data.preprocessing import Preprocessing
from gdfq.deploy import safetensors as packed
from gdfq.deploy.card import Card
from gdfq.execution.context import Context
from gdfq.execution.listeners import Terminal
from gdfq.execution.malloc import keep_freed_memory_
from gdfq.execution.seeding import stream
from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured, capture
from gdfq.plan.plan import Plan
from gdfq.quantizers.family import MINMAX
from gdfq.recipes import PAPER, QUICK, Recipe
from gdfq.sources.generator import GeneratorSource
from gdfq.sources.pixels import OptimisedSource
from gdfq.sources.pool import ImagePool
from gdfq.student.integer_network import IntegerNetwork
from gdfq.student.scheme import Scheme, with_default_layer_bits
from gdfq.tuning.base import NO_TUNING

FILE = RESULTS / "trust.json"
STUDENTS = CACHE / "trust"
FIGURE = ROOT / "docs" / "trust.svg"
DIGITS, DIGITS_BCE = "digits", "digits_bce"
PLAIN, MIXTURES, NOISE = "images", "mixtures", "noise"
HELD_OUT_SEED = stream(0, "trust").initial_seed()
"""That of `gdfq.analysis.accuracy_drop.measure_expected_drop` for seed 0, unlike any run's."""
Row = dict[str, Any]
CLASSES = {DIGITS: 10, DIGITS_BCE: 10, R20: 10, R32: 10, R56: 100, MOBILE: 1000, EFFICIENTNET: 1000}
TEST_IMAGES = {
    DIGITS: 898,
    DIGITS_BCE: 898,
    R20: 4000,
    R56: 1500,
    R32: 2000,
    MOBILE: 1000,
    EFFICIENTNET: 1000,
}
"""How many of the test images are used, the first ones."""


POOLS = {R32: 100, R56: 100, MOBILE: 64, EFFICIENTNET: 32}
"""Images that students of slow networks are made with."""


def _calibrated(name: str, pool: ImagePool) -> Recipe:
    """Direct rounding with ranges from a pool."""
    steps = -(-pool.images // pool.batch)
    return replace(
        QUICK, name=name, source=pool, tuning=NO_TUNING, quantizers=MINMAX, match_moments=False, fit_weights=False,
        steps=steps, calibration=steps, warmup=steps,
    )  # fmt: skip


_SPECTRAL = replace(instance(QUICK.source, ImagePool), images=200)
_NOISE = ImagePool(OptimisedSource(batch=64, iterations=1), images=128, batch=64, augmented=False)
_ZEROQ = ImagePool(OptimisedSource(batch=64, iterations=100), images=64, batch=64, augmented=False)
RECIPES = {
    "rounded": _calibrated("rounded", _SPECTRAL),
    "rounded-noise": _calibrated("rounded-noise", _NOISE),
    "rounded-zeroq": _calibrated("rounded-zeroq", _ZEROQ),
    "matched": replace(QUICK, source=_SPECTRAL, tuning=NO_TUNING, steps=2, calibration=2, warmup=2),
    "quick": replace(QUICK, source=_SPECTRAL),
    "quick-noise": replace(QUICK, source=replace(_NOISE, batch=100, images=200)),
    "paper": replace(PAPER, source=GeneratorSource(batch=64)),
}
"""From direct rounding to tuning, on good images and on noise: a student may learn its images."""


@dataclass(frozen=True)
class Run:
    network: str
    bits: str
    placement: str
    recipe: str
    seed: int
    steps: int | None = None

    @property
    def name(self) -> str:
        parts = [self.network, self.bits, self.placement, self.recipe, f"s{self.seed}"]
        return "-".join(parts if self.steps is None else [*parts, str(self.steps)])


def _runs(network: str, *lines: str) -> list[Run]:
    """Runs from lines such as "quick:20 1: w4a4 w3a3/relu": recipe, steps, seed, widths.

    The placement is the deployable one, or that after the widths.
    """
    found = []
    for line in lines:
        head, widths = line.split(": ")
        recipe, seed = head.split(" ")
        recipe, _, steps = recipe.partition(":")
        for bits in widths.split(" "):
            bits, _, placement = bits.partition("/")
            found.append(
                Run(
                    network,
                    bits,
                    placement or "full",
                    recipe,
                    int(seed),
                    int(steps) if steps else None,
                )
            )
    return found


_OF_DIGITS = (
    "rounded 0: w8a8 w6a6 w5a5 w4a4 w3a3",
    "matched 0: w4a4 w3a3 w2a4",
    "matched 1: w8a8 w4a8 w3a4",
    "quick:20 0: w2a4 w3a3",
    "quick:20 1: w4a4 w3a3 w2a2",
    "quick 0: w3a3 w2a2",
)
PLAN = [
    *_runs(DIGITS, *_OF_DIGITS, "quick-noise:40 0: w4a4 w3a3"),
    *_runs(DIGITS_BCE, *_OF_DIGITS),
    *_runs(
        R20,
        "rounded 0: w8a8 w6a6 w5a5 w4a4 w3a4",
        "matched 0: w4a8 w4a4 w3a3 w2a4",
        "quick:20 1: w4a4 w3a3",
    ),
    *_runs(
        EFFICIENTNET,
        "rounded 0: w8a8 w6a6",
        "matched 0: w8a8 w4a8 w5a5 w4a4 w3a8",
    ),
    *_runs(
        MOBILE,
        "rounded 0: w8a8 w6a8 w6a6",
        "matched 0: w8a8 w6a6 w5a5 w4a8 w4a4 w3a8",
    ),
    *_runs(
        R56,
        "rounded 0: w8a8 w6a6 w5a5 w4a4",
        "matched 0: w5a5 w4a4 w3a4 w3a3",
    ),
    *_runs(
        R32,
        "rounded 1: w8a8 w5a5 w4a4 w3a8",
        "matched 1: w4a4 w3a3 w2a4",
    ),
]


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """One decision for each class; most logits are then far below 0."""
    targets = F.one_hot(labels, logits.shape[1]).float()
    return F.binary_cross_entropy_with_logits(logits, targets) * logits.shape[1]


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    DIGITS: F.cross_entropy,
    DIGITS_BCE: binary_cross_entropy,
}


def shapes(network: str) -> tuple[tuple[int, ...], Preprocessing]:
    if network in _LOSSES:
        return demo.INPUT_SHAPE, demo.PREPROCESSING
    return NETWORKS[network].shape, NETWORKS[network].preprocessing


def teacher_of(network: str) -> tuple[Captured, ImageData]:
    """A network and the first of its test images."""
    shape, _ = shapes(network)
    count = TEST_IMAGES[network]
    if network in _LOSSES:
        training, held_out = demo.load_digits()
        data: ImageData = ArrayData(held_out.images, held_out.labels)
        trained = demo.train(training, loss_function=_LOSSES[network])
        return capture(trained, torch.zeros(1, *shape)), data
    found = NETWORKS[network]
    data = load_data(found.test, found.shape, CLASSES[network])
    chosen = torch.arange(min(count, len(data)))
    return capture(found.load(), torch.zeros(1, *shape)), ArrayData(
        data.images(chosen), present(data.labels)[: len(chosen)]
    )


def student_of(run: Run, teacher: Captured) -> IntegerNetwork:
    """The run's student, made or from the cache."""
    path = STUDENTS / f"{run.name}.safetensors"
    if not path.exists():
        recipe = RECIPES[run.recipe].with_steps(run.steps)
        pool = recipe.source
        if isinstance(pool, ImagePool) and (count := POOLS.get(run.network)):
            made = replace(pool.source, batch=count)  # type: ignore[type-var]
            recipe = replace(recipe, source=replace(pool, images=count, batch=count, source=made))
        recipe = replace(recipe, placement=run.placement)  # type: ignore[arg-type]
        bits = Bits.parse(run.bits)
        layer_bits = with_default_layer_bits((), bits, recipe.placement)
        scheme = Scheme(bits, recipe.placement, layer_bits).for_network(teacher)
        with Terminal() as listener:
            recipe, _ = stored(recipe, teacher, run, listener)  # type: ignore[arg-type]
            plan = Plan(teacher, scheme, recipe, recipe.source, shapes(run.network)[1])
            student = pipeline.run(plan, Context(seed=run.seed, listener=listener)).network
        card = Card(
            teacher.inputs, teacher.classes, teacher.outputs, shapes(run.network)[1],
            scheme.bits, scheme.placement, run.recipe, run.seed,
        )  # fmt: skip
        path.write_bytes(packed.to_safetensors(student, card))
    return packed.read(path)[0]


@dataclass(frozen=True)
class Known:
    """What all runs of a network share."""

    teacher: Captured
    test: ImageData
    logits: Tensor
    images: dict[str, tuple[Tensor, Tensor]]
    """Held-out images by kind, and the teacher's logits of them."""

    @classmethod
    def of(cls, name: str) -> "Known":
        teacher, test = teacher_of(name)
        made = make_images(teacher, HELD_OUT_SEED)
        kinds = {
            PLAIN: made,
            MIXTURES: mix_images(made, 4 * len(made), stream(HELD_OUT_SEED, "trust.mixtures")),
            NOISE: noise_images(teacher, HELD_OUT_SEED),
        }
        logits = logits_of(teacher.network, test, shapes(name)[1], device=torch.device("cpu"))
        with torch.no_grad():
            images = {kind: (made, teacher.network(made)) for kind, made in kinds.items()}
        return cls(teacher, test, logits, images)


def measured(run: Run, network: Known) -> Row:
    """The drop on test images, and the measures that need no test images."""
    student = student_of(run, network.teacher)
    preprocessing = shapes(run.network)[1]
    logits = logits_of(student, network.test, preprocessing, device=torch.device("cpu"))
    assert network.test.labels is not None
    found = compared(logits, network.logits, network.test.labels)
    seen = {}
    for kind, (images, wanted) in network.images.items():
        with torch.no_grad():
            got = torch.cat([student(part) for part in images.split(32)])
        seen[kind] = compared_on(wanted, got, network.images[MIXTURES][1], kind)
    top1 = {who: found[who]["all"] for who in ("teacher", "student")}
    return {
        **asdict(run), **top1,
        "drop": round(top1["teacher"] - top1["student"], 3), "drop_interval": found["drop_interval"],
        "test_images": len(logits), "agreement_on_test_images": found["agreement"],
        "seen": seen,
    }  # fmt: skip


def compared_on(wanted: Tensor, got: Tensor, on_mixtures: Tensor, kind: str) -> Row:
    """Measures of a student on images of one kind, without labels."""
    trust = estimate_drop([wanted], [got], source=kind)
    varied = kind != NOISE
    return {
        "images": trust.images, "agreement": trust.agreement, "kl": trust.kl,
        "relative_error": trust.relative_error,
        "uncentred_error": float(100 * (got - wanted).norm() / wanted.norm()),
        "logit_error": 100 * logit_error(wanted, got, varied=varied, classes=on_mixtures),
    }  # fmt: skip


def saved() -> dict[str, Row]:
    """All rows that were measured, by the name of their run."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


Predictor = Callable[[Row], float]


def largest_error(row: Row) -> float:
    """What `gdfq.analysis.accuracy_drop` goes by."""
    return max(row["seen"][kind]["logit_error"] for kind in (MIXTURES, NOISE)) / 100


def among_ten(row: Row, value: str, kind: str = MIXTURES) -> float:
    return float(row["seen"][kind][value] / 100 * (np.log10(CLASSES[row["network"]])) ** 0.5)


def disagreement_odds(row: Row) -> float:
    share = 1 - row["seen"][MIXTURES]["agreement"] / 100
    return share / (1.001 - share)


PREDICTORS: dict[str, Predictor] = {
    "error of the logits, largest of mixtures and noise": largest_error,
    "error of the logits of mixtures": lambda row: row["seen"][MIXTURES]["logit_error"] / 100,
    "error of the logits of noise": lambda row: row["seen"][NOISE]["logit_error"] / 100,
    "error of the logits of images": lambda row: row["seen"][PLAIN]["logit_error"] / 100,
    "relative error of centred logits of mixtures": lambda row: among_ten(row, "relative_error"),
    "relative error of logits of mixtures, not centred": lambda row: among_ten(
        row, "uncentred_error"
    ),
    "√KL on mixtures": lambda row: row["seen"][MIXTURES]["kl"] ** 0.5,
    "odds of disagreement on mixtures": disagreement_odds,
}
"""What else was tried, under the same law."""


def fitted(rows: list[Row], predictor: Predictor = largest_error) -> tuple[float, float]:
    """Shift and power of the law; each network weighs as much as any other."""
    seen = np.log(np.maximum([predictor(row) for row in rows], 1e-3))
    drops = np.array([row["drop"] for row in rows])
    count = Counter(row["network"] for row in rows)
    weight = np.array([count[row["network"]] ** -0.5 for row in rows])

    def residuals(law: np.ndarray) -> np.ndarray:
        expected = 100 / (1 + np.exp(-(law[0] + law[1] * seen)))
        return weight * logarithmic(expected, drops)

    shift, power = least_squares(residuals, [-2.0, 2.0]).x
    return float(shift), float(power)


def logarithmic(expected: np.ndarray, drop: np.ndarray) -> np.ndarray:
    """The error of log(1 + drop in points); a network that gained lost nothing."""
    return np.log1p(expected) - np.log1p(np.maximum(drop, 0))


def left_out(
    rows: list[Row], predictor: Predictor = largest_error, groups: dict[str, str] | None = None
) -> np.ndarray:
    """Expected drops of all rows, each by a law that never saw its network (or group of them)."""
    group = [(groups or {}).get(row["network"], row["network"]) for row in rows]
    expected = np.zeros(len(rows))
    for name in set(group):
        others = [row for row, own in zip(rows, group, strict=True) if own != name]
        law = Law(*fitted(others, predictor), error=0, limit=1)
        for i, row in enumerate(rows):
            if group[i] == name:
                expected[i] = law.drop(predictor(row))
    return expected


Statistic = Callable[[np.ndarray], float]


def nine_of_ten(errors: np.ndarray) -> float:
    return float(np.quantile(errors, 0.9))


def resampled(values: np.ndarray, statistic: Statistic) -> tuple[float, float]:
    """The 95 % interval of a statistic over 2,000 resamples of the runs."""
    random = np.random.default_rng(0)
    draws = [statistic(random.choice(values, len(values))) for _ in range(2000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def bootstrapped(values: np.ndarray, statistic: Statistic) -> str:
    low, high = resampled(values, statistic)
    return f"{statistic(values):.2f} ({low:.2f} to {high:.2f})"


def report(rows: list[Row]) -> None:
    """The law, its leave-one-network-out error, and what else was tried."""
    inside = [row for row in rows if largest_error(row) <= LAW.limit]
    beyond = [row for row in rows if largest_error(row) > LAW.limit]
    drops = np.array([row["drop"] for row in inside])
    expected = left_out(inside)
    shift, power = fitted(inside)
    off = np.abs(logarithmic(expected, drops))
    # Few networks: the interval is drawn at the upper end of what its own width may be.
    error = resampled(off, nine_of_ten)[1]
    law = Law(round(shift, 2), round(power, 2), round(error, 2), LAW.limit)
    print(f"\n{len(rows)} runs of {len({row['network'] for row in rows})} networks; {law}")
    print(f"gdfq.analysis.accuracy_drop.LAW is {'this' if law == LAW else f'another: {LAW}'}\n")
    print(
        "| network | runs | drops | median error, points | largest error, points | drops inside the interval |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for network in TEST_IMAGES:
        chosen = np.array([row["network"] == network for row in inside])
        if chosen.any():
            print(line(network, drops[chosen], expected[chosen], law))
    for low, high in ((-100, 2), (2, 10), (10, 100)):
        chosen = (drops >= low) & (drops < high)
        if chosen.any():
            name = f"drops of {max(low, 0)} to {high} points"
            print(line(name, drops[chosen], expected[chosen], law))
    print(line("all", drops, expected, law))
    points = np.abs(expected - drops)
    print(f"\nmedian error: {bootstrapped(points, lambda x: float(np.median(x)))} points")
    print(f"error of log(1 + drop), nine of ten: {bootstrapped(off, nine_of_ten)}")
    both = left_out(inside, groups={R20: "cifar10", R32: "cifar10"})
    print(
        f"the same with both CIFAR-10 networks left out together: {np.quantile(np.abs(logarithmic(both, drops)), 0.9):.2f}"
    )
    print(
        "\n| predictor | error of log(1 + drop): nine of ten | root mean square |\n| --- | --- | --- |"
    )
    for name, predictor in PREDICTORS.items():
        off = np.abs(logarithmic(left_out(inside, predictor), drops))
        print(f"| {name} | {nine_of_ten(off):.2f} | {np.sqrt((off**2).mean()):.2f} |")
    print()
    trained = np.array([row["recipe"] == "quick" for row in inside])
    for name, chosen in (("tuned on spectral images", trained), ("others", ~trained)):
        signed = logarithmic(expected, drops)[chosen]
        print(f"mean signed error of log(1 + drop), {name} ({chosen.sum()}): {signed.mean():+.2f}")
    signed = logarithmic(expected, drops)
    worst = int(signed.argmin())
    print(
        f"the most underestimated drop: {expected[worst]:.1f} expected, {drops[worst]:.1f} lost; "
        f"its interval ends at {law.interval(expected[worst])[1]:.1f}"
    )
    noise = np.mean([(row["drop_interval"][1] - row["drop_interval"][0]) / 2 for row in inside])
    print(f"the test images themselves leave ± {noise:.1f} points on average")
    if beyond:
        least, most = (f(row["drop"] for row in beyond) for f in (min, max))
        print(f"{len(beyond)} runs beyond {LAW.limit} lost {least:.1f} to {most:.1f} points")
    draw(inside, expected, law)


def line(name: str, drops: np.ndarray, expected: np.ndarray, law: Law) -> str:
    off = np.abs(expected - drops)
    ends = [law.interval(value) for value in expected]
    held = sum(low <= max(drop, 0) <= high for drop, (low, high) in zip(drops, ends, strict=True))
    cells = [
        name,
        len(drops),
        f"{drops.min():.1f} to {drops.max():.1f}",
        f"{np.median(off):.1f}",
        f"{off.max():.1f}",
        f"{held} of {len(drops)}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def draw(rows: list[Row], expected: np.ndarray, law: Law) -> None:
    """Expected against measured drop, each expected by a law that never saw its network."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "gdfq"  # the same file each time
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 5))
    axis = np.linspace(0, 70, 200)
    ends = np.array([law.interval(value) for value in axis])
    axes.fill_betweenx(axis, *ends.T, alpha=0.15, color="grey", label="interval")
    axes.plot(axis, axis, color="grey", linewidth=1)
    for network in TEST_IMAGES:
        chosen = [i for i, row in enumerate(rows) if row["network"] == network]
        if chosen:
            drops = [max(rows[i]["drop"], 0) for i in chosen]
            axes.plot(drops, expected[chosen], "o", markersize=5, label=network)
    for scale in (axes.set_xscale, axes.set_yscale):
        scale("function", functions=(np.log1p, np.expm1))
    ticks = [0, 1, 2, 5, 10, 20, 50]
    axes.set(
        xlabel="measured drop, points",
        ylabel="expected drop, points (network left out)",
        xlim=(0, 60),
        ylim=(0, 60),
        xticks=ticks,
        yticks=ticks,
    )
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=TEST_IMAGES, default=list(TEST_IMAGES))
    parser.add_argument("--fit", action="store_true", help="only fit what was measured before")
    options = parser.parse_args()
    keep_freed_memory_()
    STUDENTS.mkdir(parents=True, exist_ok=True)
    rows = saved()
    for name in () if options.fit else options.networks:
        if name != DIGITS and not SHARED.is_dir():
            print(f"{name}: skipped, {SHARED} is not there")
            continue
        missing = [run for run in PLAN if run.network == name and run.name not in rows]
        network = Known.of(name) if missing else None
        for run in missing:
            assert network is not None
            started = time.perf_counter()
            row = measured(run, network)
            rows = saved() | {run.name: row}  # other processes may measure other networks
            FILE.write_text(json.dumps(rows, indent=1) + "\n")
            print(
                f"{run.name}: lost {row['drop']:.2f} of {row['teacher']:.2f}, logits off by "
                f"{largest_error(row):.1%}, {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    report([rows[run.name] for run in PLAN if run.name in rows])


if __name__ == "__main__":
    main()
