"""The content of each section of the report; a sentence if a run has no values for it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from matplotlib.figure import Figure

from gdfq.report import figures
from gdfq.report.denoiser import is_denoiser
from gdfq.report.language import is_language_model, rise_of
from gdfq.report.pictures import data_uri, histogram_path, place
from gdfq.report.read import Record, Run, number
from gdfq.report.sensitive_layers import SENSITIVITY_NAMES, sensitive_layers
from gdfq.report.source_warnings import source_warnings
from gdfq.report.wording import errors_by_output
from gdfq.runs.names import CONFIG, EVIDENCE, HISTORY, METRICS


@dataclass(frozen=True, eq=False)
class Content:
    """Values for a section's template, and its figures by name."""

    values: Mapping[str, Any]
    figures: Mapping[str, Figure | None] = field(default_factory=dict)


def trust(run: Run) -> Content | str:
    """The expected accuracy drop."""
    found = run.evidence.get("trust")
    if not found:
        return f"The accuracy drop was not estimated: {_missing(run, 'trust')}"
    has_estimate = number(found.get("expected_drop")) is not None
    return Content({"trust": found, "has_estimate": has_estimate})


def text(run: Run) -> Content | str:
    """A language model: its divergence, outlier channels, and what both models write."""
    found = run.evidence.get("text") or {}
    shown = (found.get(f"{who}_text") or [] for who in ("teacher", "student"))
    return Content(
        {
            "rise": rise_of(run),
            "own": run.metrics["own_text"],
            "test": run.metrics.get("language"),
            "outliers": found.get("outliers") or [],
            "pairs": list(zip(*shown, strict=False)),
        }
    )


def images(run: Run) -> Content | str:
    """The images that the student was tuned on."""
    found = run.evidence.get("images")
    if not found:
        return f"The images were not measured: {_missing(run, 'images')}"
    grid, noise = run.arrays["images.grid"], run.arrays["images.noise"]
    labels = run.arrays["images.labels"].tolist()
    shown = list(map(data_uri, grid)) if grid.ndim == 4 else []
    pairs = list(zip(labels or [None] * len(shown), shown, strict=False))
    rows = [
        (label, [uri for _, uri in group]) for label, group in groupby(pairs, lambda pair: pair[0])
    ]
    return Content(
        {
            "images": found,
            "given": bool(run.config.get("data")),
            "warnings": source_warnings(run),
            "rows": rows,
            "noise": list(map(data_uri, noise)) if noise.ndim == 4 else [],
            "means": _means(found["distances"]),
        },
        {"statistics": figures.distances(found["distances"])},
    )


def candidates(run: Run) -> Content | str:
    """The images from elsewhere: what the screen kept and dropped."""
    found = run.evidence.get("candidates")
    if not found:
        if not (run.config.get("proxy") or run.config.get("generate_with")):
            return "No images from elsewhere were given (--proxy, --generate-with)."
        return f"The images from elsewhere were not measured: {_missing(run, 'candidates')}"
    shown = {
        kind: [
            {**example, "uri": data_uri(pixels)}
            for example, pixels in zip(
                found[kind], run.arrays[f"candidates.{kind}_images"], strict=False
            )
        ]
        for kind in ("kept", "dropped")
    }
    return Content({"facts": found["facts"], "sentence": found["sentence"], **shown})


def _means(distances: Sequence[Record]) -> Mapping[str, float]:
    """The mean distance of each kind of image over all batch norms."""
    kinds = ("synthetic", "white", "natural")
    return {kind: sum(d[kind] for d in distances) / len(distances) for kind in kinds if distances}


def layers(run: Run) -> Content | str:
    """The layers, most sensitive first; then the activations that are the input of no layer."""
    found = run.evidence.get("layers")
    if not found:
        return f"The layers were not compared: {_missing(run, 'layers')}"
    activations = {
        activation["name"]: {**activation, **_drawn(run, "activation", index, activation)}
        for index, activation in enumerate(found["activations"])
    }
    total = sum(layer["sensitivity"] or 0 for layer in found["layers"])
    rows = [
        {
            **layer,
            **_drawn(run, "weight", index, None),
            "sensitivity_share": _share(layer["sensitivity"], total),
            "input": activations.get(layer["activation"]),
        }
        for index, layer in enumerate(found["layers"])
    ]
    rows.sort(key=lambda row: -(row["sensitivity"] or 0))
    read = {layer["activation"] for layer in found["layers"]}
    return Content(
        {
            "layers": rows,
            "others": [row for name, row in activations.items() if name not in read],
            "sensitive": sensitive_layers(found["layers"]),
            "kind": found["sensitivity"],
            "whole": SENSITIVITY_NAMES[found["sensitivity"]],
            "count": found["images"],
        },
        {
            "sensitivity": figures.sensitivities(found["layers"], found["sensitivity"]),
            "signal": figures.signal(found["layers"]),
        },
    )


def _share(value: float | None, total: float) -> float | None:
    """A part of the total in percent."""
    return None if value is None else 100 * value / (total or 1)


def _drawn(run: Run, kind: str, index: int, grid: Record | None) -> dict[str, Any]:
    """The histogram of a tensor's values as a path, and the positions of the ends of its grid."""
    ends = run.arrays[f"layers.{kind}_ends"][index].tolist()
    path = histogram_path(run.arrays[f"layers.{kind}_counts"][index])
    marks = [] if grid is None else [place(grid[end], ends) for end in ("low", "high")]
    return {"path": path, "marks": marks}


def training(run: Run) -> Content | str:
    """Losses, learning rates and ranges by step; time by stage."""
    seconds = run.metrics.get("seconds") or {}
    if not run.history and not seconds:
        return f"The training is not known: {run.problems.get(HISTORY, 'no steps were recorded.')}"
    names = list(dict.fromkeys(record["stage"] for record in run.history))
    drawn = {f"losses-{name}": figures.losses(run.history, name) for name in names}
    moving = {f"ranges-{name}": figures.ranges(run.history, name) for name in names}
    return Content(
        {"rates": list(_rates(run.config.get("recipe"))), "seconds": seconds},
        {
            **drawn,
            "rate": figures.rates(run.history),
            **moving,
            "seconds": figures.stages(seconds),
        },
    )


def _rates(recipe: object) -> Iterator[tuple[str, float]]:
    """The learning rates at the start of tuning."""
    tuning = recipe.get("tuning") if isinstance(recipe, dict) else None
    optimizer = (tuning or {}).get("optimizer") or {}
    for name, names in _RATES.items():
        rate = next((optimizer[n] for n in names if optimizer.get(n)), None)
        if rate is not None:
            yield name, rate


_RATES: Mapping[str, tuple[str, ...]] = {
    "lr": ("lr",),
    "code_lr": ("code_lr", "codes"),
    "scale_lr": ("scale_lr", "steps"),
    "other_lr": ("other_lr", "others"),
    "rounding_lr": ("rounding_lr", "roundings"),
}
"""Fields of an optimizer that are learning rates, with their names in version 0.1."""


def test(run: Run) -> Content | str:
    """The changes of the predictions for labelled images."""
    found = run.evidence.get("test")
    errors = (run.metrics.get("student") or {}).get("error_percent")
    if not found and errors:
        return "The network has no classes. " + " ".join(_similarities(run.metrics["student"]))
    if not found and run.drop is not None:
        before, after = (run.metrics[who]["top1"] for who in ("teacher", "student"))
        return (
            f"The accuracy was {before:.2f} % before and is {after:.2f} % after. "
            f"Details are missing: {_missing(run, 'test')}"
        )
    if not found:
        return "No labelled test images were given (--test), so no accuracy was measured."
    pictures = run.arrays["test.pictures"]
    shown = list(map(data_uri, pictures)) if pictures.ndim == 4 else []
    changes = sorted(
        ((label, n, a, b, b - a) for label, n, a, b in found["by_class"]), key=lambda row: row[4]
    )
    return Content(
        {
            "test": found,
            "margin": 1.96 * found["error"],
            "changes": changes,
            "flips": list(zip(found["flips"], shown, strict=False)),
        },
        {
            "classes": figures.class_changes(found["by_class"]),
            "reliability": figures.reliability(found["calibration"]),
        },
    )


def _similarities(student: Record) -> Iterator[str]:
    """What was measured of outputs that are not of classes, a sentence for each measure."""
    for found, text, form in (
        (student.get("cosine"), "Mean cosine with the original's vectors", "{} {:.4f}"),
        (
            student.get("decisions_percent"),
            "Equal decisions (a probability above one half)",
            "{} {:.2f} %",
        ),
        (errors_by_output(student), "Relative errors of its outputs", "{} {:.2f} %"),
    ):
        if found:
            yield f"{text}: {', '.join(form.format(*pair) for pair in found.items())}."


def samples(run: Run) -> Content | str:
    """The images that a denoiser and its student generated from the same noise."""
    found = run.evidence.get("samples")
    if not found:
        return f"No images were generated to compare: {_missing(run, 'samples')}"
    pictures = [run.arrays[f"samples.{who}"] for who in ("teacher", "student")]
    pairs = [
        tuple(map(data_uri, pair)) for pair in zip(*pictures, strict=True) if pictures[0].ndim == 4
    ]
    return Content(
        {"samples": found, "pairs": pairs},
        {"samples-errors": figures.errors_by_time(found["timesteps"], found["errors"])},
    )


def repeat(run: Run) -> Content | str:
    """How to reproduce the run."""
    if not run.config:
        return run.problems.get(CONFIG, "The options of the run are not known.")
    names = {
        "gdfq": "gdfq",
        "torch": "torch",
        "python": "Python",
        "device": "device",
        "threads": "threads",
        "model": "network",
        "weights": "weights",
        "weights_sha256": "SHA-256 of the weights",
        "input": "input",
        "output": "output",
        "bits": "bits",
        "placement": "placement",
        "layer_bits": "layer bits",
        "keep": "layer bits",  # as version 0.1 wrote it
        "seed": "seed",
        "data": "given images",
        "test": "test data",
    }
    values = {label: run.config[key] for key, label in names.items() if run.config.get(key)}
    if run.exported.get("sha256"):
        values[f"SHA-256 of {run.exported.get('path', 'the file')}"] = run.exported["sha256"]
    recipe: Any = run.config.get("recipe")
    values["recipe"] = recipe.get("name") if isinstance(recipe, dict) else recipe
    values["seed"] = run.config.get("seed")
    return Content({"command": run.config.get("command"), "values": values, "recipe": recipe})


def _missing(run: Run, section: str) -> str:
    """Why a section of the evidence is missing."""
    reason = (run.evidence.get("missing") or {}).get(section)
    if reason:
        return f"{reason}."
    unfinished = run.problems.get(METRICS)
    return run.problems.get(EVIDENCE) or unfinished or "the run has no values for it."


SECTIONS: Mapping[str, tuple[str, Callable[[Run], Content | str]]] = {
    "trust": ("Expected accuracy drop", trust),
    "text": ("Language model", text),
    "images": ("Images", images),
    "candidates": ("Images from elsewhere", candidates),
    "layers": ("Layers", layers),
    "training": ("Training", training),
    "samples": ("Generated images", samples),
    "test": ("Test images", test),
    "repeat": ("Reproducing the run", repeat),
}
_OF_TEXT = ("text", "layers", "training", "repeat")
"""Sections of language models."""
_OF_DENOISERS = ("samples", "layers", "training", "repeat")
"""Sections of denoisers of diffusion models."""
_OF_OTHERS = tuple(key for key in SECTIONS if key not in ("text", "samples"))


def sections_of(run: Run) -> Mapping[str, tuple[str, Callable[[Run], Content | str]]]:
    """Return the sections that a run has, by the kind of its network, in their order."""
    is_text = is_language_model(run)
    keys = _OF_TEXT if is_text else _OF_DENOISERS if is_denoiser(run) else _OF_OTHERS
    return {key: SECTIONS[key] for key in keys}
