"""What synthetic images reveal of training images: their distances, compared with unseen images.

    python -m benchmarks.privacy            # every network, source and seed not measured yet

The question of each synthetic image: is its nearest image of all a training image, or one of as many
test images, which the network never saw? Images that copy training images are nearer to those; images
that copy nothing fall either way. Three rows give the scale: other test images (what independent
images do), and training images moved and noisy (what copies do).

Distances are taken in three ways: between pixels, between pixels without brightness and contrast
(each image has mean 0 and length 1), and between the features that enter the network's last layer. Each
reference counts with its mirror image. Synthetic images are taken as `gdfq generate` saves them, in
8-bit pixels.

Several images can have the same nearest one, so intervals (95 %) resample the nearest images, each
with all that it is nearest to. Rows go to benchmarks/results/privacy.json, the table to docs/privacy.md.
Needs the networks and images of ../shared.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.trained_networks import NETWORKS, R20, R32, R56, Network
from support.narrowing import present
from support.places import RESULTS, ROOT, SHARED
from torch import Tensor, nn

from gdfq.analysis.accuracy import logits_of
from gdfq.api import generate
from gdfq.data.datasets import load_data
from gdfq.execution.malloc import keep_freed_memory_
from gdfq.graph.capture import Captured, capture
from gdfq.recipes import FAST, PAPER, Recipe
from gdfq.sources.generator import GeneratorSource

FILE = RESULTS / "privacy.json"
PAGE, MARK, END = ROOT / "docs" / "privacy.md", "<!-- benchmarks/privacy.py -->", "<!-- end -->"
REFERENCES = 5000
RESAMPLED = 2000
GENERATOR = replace(PAPER, source=GeneratorSource(batch=64)).with_steps(300)
PLAN: list[tuple[str, str, Recipe, int, tuple[int, ...]]] = [
    (R20, "fast", FAST, 512, (0, 1, 2)),
    (R32, "fast", FAST, 256, (0, 1, 2)),
    (R56, "fast", FAST, 256, (0, 1, 2)),
    (R20, "paper, 300 steps of 64 images", GENERATOR, 512, (0,)),
]
"""Network, name and recipe of the source, images from each seed, seeds."""
Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Subject:
    """A network with training images, unseen images to compare with, and unseen ones to ask about."""

    model: nn.Module
    network: Network
    train: Tensor
    test: Tensor
    others: Tensor

    def embeddings(self) -> dict[str, Embed]:
        """Pixels uint8 [N, C, H, W] to vectors [N, D], whose Euclidean distance is meant."""
        return {
            "pixels": lambda x: x.flatten(1).float() / x[0].numel() ** 0.5,
            "pixels without contrast": without_contrast,
            "features": self.features,
        }

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """What enters the last layer [N, D]."""
        seen: list[Tensor] = []
        last = [layer for layer in self.model.modules() if isinstance(layer, nn.Linear)][-1]
        handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for part in pixels.split(250):
            self.model(self.network.preprocessing(part))
        handle.remove()
        return torch.cat(seen)


def without_contrast(pixels: Tensor) -> Tensor:
    flat = pixels.flatten(1).float()
    return F.normalize(flat - flat.mean(1, keepdim=True), dim=1)


def subject(name: str) -> Subject:
    network = NETWORKS[name]
    model = network.load()
    train, test = (
        load_data(file, network.shape, None) for file in (present(network.train), network.test)
    )
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    held, others = test.images(order[:REFERENCES]), test.images(order[REFERENCES:])
    return Subject(model, network, train.images(torch.arange(REFERENCES)), held, others)


def nearest(asked: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest reference or its mirror image, and which reference that is: [N], [N].

    asked [N, D]; references [2R, D], the mirror images behind the others.
    """
    distance, which = torch.cdist(asked, references).min(1)
    return distance, which % (len(references) // 2)


def compared(asked: Tensor, train: Tensor, test: Tensor) -> dict[str, Any]:
    """Nearest training against nearest test image, over all queries [N, D]."""
    to_train, which_train = nearest(asked, train)
    to_test, which_test = nearest(asked, test)
    nearer = (to_train < to_test).double()
    owner = torch.where(to_train < to_test, which_train, which_test + REFERENCES)
    medians = torch.stack([to_train.median(), to_test.median()]).tolist()
    shares, ratios = [], []
    for chosen in resampled(owner):
        shares.append(float(nearer[chosen].mean()))
        ratios.append(float(to_train[chosen].median() / to_test[chosen].median()))
    return {
        "nearer_to_training": interval(float(nearer.mean()), shares),
        "ratio_of_medians": interval(medians[0] / medians[1], ratios),
        "median_to_training": medians[0],
        "median_to_test": medians[1],
        "nearest_to_training": float(to_train.min()),
        "different_nearest": len(owner.unique()),
        "queries": len(asked),
    }


def resampled(owner: Tensor) -> Iterator[Tensor]:
    """Queries, drawn as whole groups that have the same nearest reference."""
    draw = torch.Generator().manual_seed(0)
    _, group = owner.unique(return_inverse=True)
    groups = [(group == index).nonzero().flatten() for index in range(int(group.max()) + 1)]
    for _ in range(RESAMPLED):
        picks = torch.randint(len(groups), (len(groups),), generator=draw).tolist()
        yield torch.cat([groups[pick] for pick in picks])


def interval(value: float, drawn: list[float]) -> list[float]:
    """The value with its 95 % interval."""
    low, high = torch.quantile(torch.tensor(drawn), torch.tensor([0.025, 0.975])).tolist()
    return [round(number, 4) for number in (value, low, high)]


def copies(images: Tensor) -> Tensor:
    """What memorised images could look like: moved by a pixel, with noise of 5 of 255 levels."""
    noise = 5 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images.roll(1, -1) + noise).round().clamp(0, 255).to(torch.uint8)


def by_view(of: Subject, asked: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Each way to take distances, and what it says of all that is asked about."""
    found = {}
    for view, embed in of.embeddings().items():
        train, test = (
            torch.cat([embed(side) for side in (images, images.flip(-1))])
            for images in (of.train, of.test)
        )
        found[view] = {who: compared(embed(images), train, test) for who, images in asked.items()}
    return found


def synthetic(
    of: Subject, teacher: Captured, recipe: Recipe, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Pixels and labels, as `gdfq generate` saves them."""
    example = torch.zeros(1, *teacher.input_shape)
    images, labels = generate(teacher, example, count, recipe, seed=seed)
    assert labels is not None
    return of.network.preprocessing.pixels(images), labels


def label_agreement(name: str, images: Tensor, labels: Tensor) -> float:
    """Share of the images, in percent, whose predicted class is their label."""
    judge = subject(name)
    data = load_data((images, labels), judge.network.shape, None)
    logits = logits_of(judge.model, data, judge.network.preprocessing, device=torch.device("cpu"))
    return round(100 * float((logits.argmax(1) == labels).double().mean()), 2)


def measured(name: str, recipe: Recipe, count: int, seeds: tuple[int, ...]) -> dict[str, object]:
    """Everything about the images that one network gives away."""
    of = subject(name)
    teacher = capture(of.model, torch.zeros(1, *of.network.shape))
    made = [synthetic(of, teacher, recipe, count, seed) for seed in seeds]
    images, labels = (torch.cat(parts) for parts in zip(*made, strict=True))
    asked = {
        "synthetic": images,
        "other test images": of.others[: len(images)],
        "training images, moved and noisy": copies(of.train[: len(images)]),
    }
    judges = [judge for judge in (R20, R32, R56) if NETWORKS[judge].test == of.network.test]
    return {
        "by_view": by_view(of, asked),
        "taken_for_their_labels": {
            judge: label_agreement(judge, images, labels) for judge in judges
        },
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| network | source | asked | distance | nearer to a training image | median distance: "
        "training / test | ratio | nearest of all to a training image |",
        "| --- |" + " --- |" * 7,
    ]
    for key, row in rows.items():
        name, source = key.split(": ")
        for view, asked in row["by_view"].items():
            for who, found in asked.items():
                share, low, high = (100 * part for part in found["nearer_to_training"])
                ratio, below, above = found["ratio_of_medians"]
                lines.append(
                    f"| {name} | {source} | {who} | {view} | {share:.1f} % ({low:.1f} to {high:.1f}) "
                    f"| {found['median_to_training']:.3g} / {found['median_to_test']:.3g} "
                    f"| {ratio:.3f} ({below:.3f} to {above:.3f}) | {found['nearest_to_training']:.3g} |"
                )
    return "\n".join(lines)


def write_table(rows: dict[str, dict[str, Any]]) -> None:
    """Put the table between its marks in docs/privacy.md."""
    before, mark, rest = PAGE.read_text().partition(MARK)
    assert mark, f"{PAGE} must have the line {MARK}"
    PAGE.write_text(f"{before}{MARK}\n\n{table(rows)}\n\n{END}{rest.partition(END)[2]}")


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    keep_freed_memory_()
    if not SHARED.is_dir():
        sys.exit(f"skipped: the networks and images of {SHARED} are not there")
    rows = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name, source, recipe, count, seeds in PLAN:
        key = f"{name}: {source}"
        if key not in rows:
            rows[key] = measured(name, recipe, count, seeds)
            FILE.write_text(json.dumps(rows, indent=1) + "\n")
        print(key, json.dumps(rows[key]["taken_for_their_labels"]), flush=True)
        write_table(rows)


if __name__ == "__main__":
    main()
