"""A language model without text: bits, equalizers, fitting and tuning, on own text and on real text.

    python -m benchmarks.language               # every row that is not there yet
    python -m benchmarks.language --rows 4      # the first four of them
    python -m benchmarks.language --table       # writes the table into docs/language-models.md

stories260K, a Llama of 260,000 parameters, on TinyStories. All methods of a row get the same 128
sequences of 128 tokens: own text that the model samples (other text for each seed), or the first
100 validation stories. Perplexity is that of the last 100 stories, 256 tokens each, which nothing
else sees; KL is that of own text which no method saw. Rows are kept in results/language.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from support.places import RESULTS, ROOT, SHARED
from torch import Tensor

from gdfq.analysis.language import language_measures
from gdfq.equalizers.named import EQUALIZERS
from gdfq.execution.context import Context
from gdfq.execution.seeding import stream
from gdfq.files.plain_values import fingerprint
from gdfq.pipeline import run
from gdfq.plan.method import resolve_method
from gdfq.plan.network import Network, resolve_network
from gdfq.plan.resolve import plan_of
from gdfq.recipes import TEXT, TEXT_QUICK, Recipe
from gdfq.sources.own_text import Sampling, sampled

FILE = RESULTS / "language.json"
PAGE = ROOT / "docs" / "language-models.md"
MODEL = SHARED / "models" / "stories260k"
STORIES = SHARED / "data" / "tinystories_val_tokens.npz"
ROUND = replace(TEXT_QUICK, equalizer=None, fit_weights=False)
FIT = replace(TEXT_QUICK, equalizer=None)
DISTILLED = replace(TEXT, equalizer=None)
TUNED = "fitted, distilled"
METHODS: Mapping[str, Recipe] = {
    "rounded": ROUND,
    "fitted": FIT,
    "distilled": replace(DISTILLED, fit_weights=False),
    TUNED: DISTILLED,
}


@dataclass(frozen=True)
class Row:
    """What is measured."""

    bits: str
    equalizer: str
    method: str
    text: str = "own"
    seed: int = 0
    group_size: int | None = None

    @property
    def recipe(self) -> Recipe:
        return replace(METHODS[self.method], equalizer=EQUALIZERS[self.equalizer])


PLAN: tuple[tuple[Sequence[str], Sequence[str], Sequence[str], str, int | None], ...] = (
    # bits, equalizers, methods, text, group size. Where activations stay float no equalizer is used.
    (("w4a4",), tuple(EQUALIZERS), ("rounded", "fitted"), "own", None),
    (("w8a8", "w4a8"), ("none", "hadamard"), ("rounded", "fitted"), "own", None),
    (("w4a16", "w3a16"), ("none",), tuple(METHODS), "own", None),
    (("w4a4",), ("hadamard",), ("distilled", TUNED), "own", None),
    (("w8a8", "w4a8"), ("hadamard",), (TUNED,), "own", None),
    (("w4a16",), ("none",), ("rounded", "fitted", TUNED), "own", 16),
    (("w4a4", "w4a8", "w8a8"), ("hadamard",), ("fitted", TUNED), "real", None),
    (("w4a16", "w3a16"), ("none",), ("fitted", TUNED), "real", None),
    (("w4a4",), ("none", "smooth", "reassembly"), (TUNED,), "own", None),
)


def plan() -> list[Row]:
    """All rows, a seed after the other."""
    return [
        Row(bits, equalizer, method, text, seed, group_size)
        for seed in (0, 1, 2)
        for all_bits, equalizers, methods, text, group_size in PLAN
        for bits in all_bits
        for equalizer in equalizers
        for method in methods
        # Neither rounding nor fitting to given text is random.
        if seed == 0
        or equalizer != "none"
        or "distilled" in method
        or (method, text) == ("fitted", "own")
    ]


@cache
def network() -> Network:
    return resolve_network(f"hf:{MODEL}")


@cache
def stories() -> Tensor:
    with np.load(STORIES) as file:
        return torch.from_numpy(file["tokens"].astype(np.int64))


@cache
def own_text(seed: int, purpose: str, count: int) -> Tensor:
    """Text that the model writes, as the recipe has it."""
    teacher = network().teacher
    assert teacher.vocabulary is not None
    draw = stream(seed, purpose)
    return sampled(teacher.network, teacher.vocabulary, count, Sampling(), draw)


def measured(row: Row) -> dict[str, Any]:
    """Measure a row."""
    is_real = row.text == "real"
    text = stories()[:100, :128] if is_real else own_text(row.seed, "text.sample", 128)
    started = time.process_time()
    method = resolve_method(row.bits, row.recipe, group_size=row.group_size)
    quantized = run(plan_of(network(), method, data=text), Context(seed=row.seed))
    seconds = time.process_time() - started
    teacher = network().teacher
    held = own_text(1000, "text.benchmark", 32)
    on_test, on_own = (
        language_measures(quantized.network, teacher.network, tokens)
        for tokens in (stories()[100:], held)
    )
    return {
        **asdict(row),
        "recipe": fingerprint(row.recipe),
        "perplexity": round(on_test.perplexity, 4),
        "teacher_perplexity": round(on_test.teacher_perplexity, 4),
        "test_kl": round(on_test.divergence, 5),
        "agreement": round(on_test.agreement, 2),
        "own_kl": round(on_own.divergence, 5),
        "cpu_seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(FILE.read_text()) if FILE.exists() else []
    return found


def keep(row: dict[str, Any]) -> dict[str, Any]:
    """Write a row among the others, in the place of an older one."""
    found = {key(other): other for other in rows()} | {key(row): row}
    FILE.write_text(json.dumps(list(found.values()), indent=1) + "\n")
    return row


def key(row: Mapping[str, Any]) -> Row:
    return Row(**{name: row[name] for name in Row.__dataclass_fields__})


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows in markdown: means over seeds, with the lowest and the highest."""
    lines = [
        "| bits | equalizer | method | text | perplexity | rise | KL on unseen own text | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in found:
        bits = row["bits"] + (f" in groups of {row['group_size']}" if row["group_size"] else "")
        groups.setdefault((bits, row["equalizer"], row["method"], row["text"]), []).append(row)
    for names, group in sorted(groups.items(), key=lambda item: item[0][0]):
        values = [row["perplexity"] for row in group]
        kl = statistics.mean(row["own_kl"] for row in group)
        mean, before = statistics.mean(values), group[0]["teacher_perplexity"]
        spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
        rise = 100 * (mean / before - 1)
        lines.append(
            f"| {' | '.join(names)} | {mean:.3f}{spread} | {rise:+.1f} % | {kl:.4f} | {len(group)} |"
        )
    return "\n".join(lines)


_BEGIN, _END = "<!-- table: begin -->\n", "<!-- table: end -->"


def write_table() -> None:
    """Write the table into the page."""
    before, _, rest = PAGE.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    PAGE.write_text(f"{before}{_BEGIN}{table(rows())}\n{_END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=None, help="at most so many new rows")
    parser.add_argument("--table", action="store_true", help="write the table alone")
    options = parser.parse_args()
    if not options.table:
        if not MODEL.exists():
            raise SystemExit(f"the measured model is not there: {MODEL}")
        present = {key(row): row for row in rows()}
        missing = [
            row
            for row in plan()
            if row not in present or present[row]["recipe"] != fingerprint(row.recipe)
        ]
        for row in missing[: options.rows]:
            print(json.dumps(keep(measured(row))), flush=True)
    write_table()


if __name__ == "__main__":
    main()
