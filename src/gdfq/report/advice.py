"""What a user can do next to improve a run."""

from collections.abc import Iterator, Sequence
from typing import Any

from gdfq.errors import UsageError
from gdfq.functional.grid import MAX_BITS, Bits
from gdfq.recipes import FAST, recipe_for
from gdfq.report.drop import Level
from gdfq.report.read import Record, Run, number
from gdfq.report.sensitive_layers import SENSITIVITY_NAMES, sensitive_layers
from gdfq.report.wording import size_words
from gdfq.student.scheme import Scheme


def advice(run: Run, level: Level, warnings: Sequence[str]) -> Iterator[str]:
    """Yield the warnings, then what to do for a run of a level."""
    yield from warnings
    evidence = run.evidence.get("layers") or {}
    if level != "good":
        whole = SENSITIVITY_NAMES[evidence.get("sensitivity", "divergence")]
        for layer in sensitive_layers(evidence.get("layers") or []):
            yield (
                f"{layer.option} gives more bits to a layer with {layer.share:.0f} % of {whole}; "
                f"it adds {size_words(layer.bytes)}."
            )
        bits = str(run.config.get("bits", ""))
        yield from _more_bits(bits)
        name = _recipe(run.config)
        if name in {"round", "zeroq"} or (name == "quick" and _fast_tunes(bits)):
            yield f"--recipe fast loses less accuracy than {name} and takes longer."
        elif name == FAST.name and _fast_tunes(bits) and _was_untuned(run):
            yield (
                "A tuned student loses less accuracy: give a longer --budget, or neither --budget "
                "nor --steps 0."
            )
        if not run.config.get("data"):
            yield (
                "A few hundred real images, if you have them, can be better than synthetic ones: "
                "--recipe real --data DIR."
            )
    if level == "unknown" and _has_classes(run):
        images = "labelled images" if run.drop is None else "more labelled images"
        yield f"Measure the accuracy on {images}: gdfq evaluate {run.folder} --test DATA."
    if level == "good" and not warnings:
        deploy = "Deploy the file." if run.exported else f"To deploy it: gdfq export {run.folder}."
        yield f"Nothing needs to be done. {deploy}"


def _has_classes(run: Run) -> bool:
    """Whether the network is a classifier, as far as the run's files show."""
    trust = run.evidence.get("trust")
    is_without = trust and number(trust.get("agreement")) is None
    return not (is_without or (run.metrics.get("student") or {}).get("error_percent"))


def _more_bits(bits: str) -> Iterator[str]:
    weights, _, activations = bits.removeprefix("w").partition("a")
    if not (weights.isdecimal() and activations.isdecimal()):
        return
    if int(activations) < MAX_BITS:
        yield f"--bits w{weights}a{MAX_BITS}: more activation bits do not make the file larger."
    elif int(weights) < MAX_BITS:
        yield f"--bits w{MAX_BITS}a{MAX_BITS}: more weight bits make the file larger."


def _was_untuned(run: Run) -> bool:
    """Whether the student took no step of tuning."""
    return number((run.metrics.get("effort") or {}).get("steps")) == 0


def _fast_tunes(bits: str) -> bool:
    """Whether fast does more than quick at these bits of the whole network."""
    try:
        scheme = Scheme(Bits.parse(bits), "full")
    except UsageError:  # bits of each layer, or none
        return True
    return recipe_for(FAST.name, scheme).tuning.trains


def _recipe(config: Record) -> str:
    recipe: Any = config.get("recipe")
    return str(recipe.get("name", "")) if isinstance(recipe, dict) else str(recipe or "")
