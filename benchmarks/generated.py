"""What images of a diffusion model that knows the classes bring (GenQ), with recipe `quick`.

    python -m benchmarks.generated                  # every row that is not there yet
    python -m benchmarks.generated --seeds 0 --bits w4a4
    python -m benchmarks.generated --table

The network is that of `gdfq demo`, on handwritten digits; the diffusion model is a class-conditional
UNet2DModel that is trained here on the same half of the digits, and makes 1,024 images with 20 steps
for each seed. Placement `full`; accuracies are of the other half. At w3a3 "optimised" is on 256
images, and the mixture on them beside 256 generated ones; at w4a4 each is 512. Rows "as many" and
"alone" are on 512: alone unscreened, by each filter of the screen alone, and by both. "mixed" is what
`--generate-with` does, with and without the screen; "real" has training images, which the user of
GenQ does not have. Rows are kept in results/generated.json.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product
from typing import Any

import torch
from benchmarks.accuracy import compared
from benchmarks.diffusion import in_words
from benchmarks.proxies import kl
from benchmarks.rows import complete
from support import digits_ddpm
from support.narrowing import present
from support.places import CACHE, RESULTS
from torch import Tensor

import gdfq
from gdfq import demo
from gdfq.data.datasets import ArrayData
from gdfq.execution.context import Context
from gdfq.execution.seeding import stream
from gdfq.functional.screening import batch_norm_sensitivity
from gdfq.generation.generation import Generation
from gdfq.graph.capture import Captured, capture
from gdfq.plan.elsewhere import load_candidates
from gdfq.recipes import QUICK
from gdfq.sources.candidates import Candidates, Screen
from gdfq.sources.pool import ImagePool, collect
from gdfq.sources.screen import Judge, screened

FILE = RESULTS / "generated.json"
BITS = ("w4a4", "w3a3")
IMAGES, STEPS = 1024, 20
"""Generated for each seed, and denoising steps of each."""
NAMES = tuple(map(str, range(10)))


@cache
def network() -> Captured:
    """The trained network."""
    trained = demo.train(demo.load_digits()[0])
    return capture(trained, torch.zeros(1, *demo.INPUT_SHAPE))


@dataclass(frozen=True)
class Setting:
    """What the options of a row are made of."""

    seed: int

    @property
    def generation(self) -> Generation:
        """The images of this seed, which are made once."""
        pipeline = f"diffusers:{digits_ddpm.digits_pipeline()}"
        folder = CACHE / f"generated_digits-{self.seed}"
        made = Generation(pipeline, folder, NAMES, guidance=1, denoising_steps=STEPS, batch=64)
        made.make(NAMES, IMAGES, self.seed, torch.device("cpu"))
        return made

    @cached_property
    def candidates(self) -> Candidates:
        """The generated images."""
        return load_candidates(
            self.generation.folder, network(), demo.PREPROCESSING, kind="generated"
        )

    @property
    def unscreened(self) -> Candidates:
        return replace(self.candidates, screen=Screen(filters=False))

    @property
    def pool(self) -> ImagePool:
        """The pool of recipe `quick` for the network."""
        pool = QUICK.fitted(demo.INPUT_SHAPE).source
        assert isinstance(pool, ImagePool)
        return pool

    @cached_property
    def images(self) -> Tensor:
        """All generated images, normalised."""
        return self.candidates.images(torch.arange(IMAGES), torch.device("cpu"))

    @cached_property
    def own(self) -> Tensor:
        """The images that the recipe makes itself."""
        pool, context = self.pool, Context(seed=self.seed)
        return collect(pool.source, network(), pool.images, context=context)[0]

    def first(self, images: Tensor) -> Tensor:
        """As many images as the mixture has."""
        return images[: 2 * self.pool.images]

    def judged(self, candidates: Candidates) -> Tensor:
        """Candidates that the screen keeps."""
        context = Context(seed=self.seed)
        return screened(network(), self.own, candidates, 2 * self.pool.images, context)[1]

    def of_low_energy(self) -> Tensor:
        """Images that pass the first filter of the screen."""
        judge = Judge(network(), Screen(), Context())
        own, made = (present(judge.observe(x).energies) for x in (self.own, self.images))
        return self.images[made <= own.quantile(Screen().known_share)]

    def of_low_sensitivity(self) -> Tensor:
        """Images that pass its second filter."""
        judge = Judge(network(), Screen(), Context())
        moments = judge.observe(self.images).moments
        return self.images[batch_norm_sensitivity(moments, judge.stored) <= 0]

    def training(self) -> ArrayData:
        """As many training images, at random."""
        digits, _ = demo.load_digits()
        order = torch.randperm(len(digits.images), generator=stream(self.seed, "benchmark.proxies"))
        return ArrayData(self.first(digits.images[order]), None)


POOLS: Mapping[str, Callable[[Setting], dict[str, Any]]] = {
    "optimised": lambda _: {},
    "optimised, as many": lambda setting: {"images": 2 * setting.pool.images},
    "alone, unscreened": lambda setting: {"data": setting.judged(setting.unscreened)},
    "alone, energy": lambda setting: {"data": setting.first(setting.of_low_energy())},
    "alone, sensitivity": lambda setting: {"data": setting.first(setting.of_low_sensitivity())},
    "alone, screened": lambda setting: {"data": setting.judged(setting.candidates)},
    "mixed, unscreened": lambda setting: {"proxy": setting.unscreened},
    "mixed": lambda setting: {"generate_with": setting.generation},
    "real": lambda setting: {"data": setting.training()},
}
"""What `gdfq.quantize` gets in each row."""


def of_wanted_class(setting: Setting) -> float:
    """Share of the generated images that the network takes for what they shall be, in percent."""
    predicted = network().network(setting.images).argmax(1)
    wanted = torch.arange(IMAGES) % len(NAMES)
    return round(100 * float((predicted == wanted).double().mean()), 2)


def measured(bits: str, seed: int, pool: str) -> dict[str, Any]:
    """One row."""
    setting = Setting(seed)
    options = POOLS[pool](setting)
    started = time.process_time()
    quantized = gdfq.quantize(
        network(), None, bits, "quick", seed=seed, mean=demo.PREPROCESSING.mean,
        std=demo.PREPROCESSING.std, **options,
    )  # fmt: skip
    seconds = time.process_time() - started
    _, test = demo.load_digits()
    inputs = demo.PREPROCESSING(test.images)
    with torch.no_grad():
        student, teacher = (made(inputs) for made in (quantized.network, network().network))
    given = options.get("data")
    return {
        "bits": bits,
        "seed": seed,
        "pool": pool,
        **compared(student, teacher, test.labels),
        "kl": kl(student, teacher),
        "given": None if given is None else len(given),
        "of_wanted_class": of_wanted_class(setting),
        "candidates": quantized.metrics.get("candidates"),
        "cpu_seconds": round(seconds, 1),
        "torch": torch.__version__,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in markdown: drop of top-1 in points, and KL to the original; mean and spread."""
    seeds = len({row["seed"] for row in rows})
    lines = [f"| images ({seeds} seeds) | {' | '.join(BITS)} |", "| --- |" + " --- |" * len(BITS)]
    for pool in POOLS:
        cells = []
        for bits in BITS:
            found = [row for row in rows if (row["pool"], row["bits"]) == (pool, bits)]
            drops = [row["teacher"]["all"] - row["student"]["all"] for row in found]
            divergences = [row["kl"] for row in found]
            cells.append(f"{in_words(drops, 2)} ({in_words(divergences, 3)})" if found else "")
        lines.append(f"| {pool} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", nargs="+", choices=BITS, default=[*BITS])
    parser.add_argument("--pools", nargs="+", choices=POOLS, default=[*POOLS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the rows as a table, and end")
    options = parser.parse_args()
    wanted = () if options.table else product(options.bits, options.seeds, options.pools)
    print(table(complete(FILE, ("bits", "seed", "pool"), wanted, measured, ["student", "kl"])))


if __name__ == "__main__":
    main()
