"""How much faster a language model writes with keys and values kept than with whole passes.

    python -m benchmarks.own_text

Both read the same random tokens one by one, as sampling does, in turn and in one process, on one
thread: seconds of processor time, and the greatest difference of their logits relative to the
largest logit. stories260K needs ../shared and the extra `hf`; the other model is a Llama in plain
PyTorch with random weights, as in `language_memory`. The rows are results/own_text.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from benchmarks.language_memory import WIDE
from support.language_model import tiny_model, vocabulary
from support.places import RESULTS, SHARED
from torch import Tensor

from gdfq.graph.capture import Captured, capture
from gdfq.graph.token_by_token import Reader, WholePasses, reader_of
from gdfq.plan.network import resolve_network

FILE = RESULTS / "own_text.json"
LENGTH = 128
WIDE_LAYERS = 8


def stories() -> Captured:
    """The model of stories."""
    return resolve_network(f"hf:{SHARED / 'models' / 'stories260k'}").teacher


def wide() -> Captured:
    """A Llama of width 512 and random weights."""
    sizes = replace(WIDE, layers=WIDE_LAYERS)
    example = torch.zeros(1, LENGTH, dtype=torch.long)
    return capture(tiny_model(sizes), example, vocabulary=vocabulary(sizes))


MODELS: dict[str, tuple[Callable[[], Captured], int]] = {
    "stories260K": (stories, 128),
    f"Llama, width {WIDE.width}, {WIDE_LAYERS} layers": (wide, 4),
}
"""Models, and how many sequences are read."""


def seconds_of(reader: Reader, tokens: Tensor) -> tuple[float, Tensor]:
    """Processor time of reading tokens [N, L] one by one, and the last logits [N, vocabulary]."""
    started = time.process_time()
    for token in tokens.split(1, 1):
        logits = reader.read(token)
    return time.process_time() - started, logits


def measured(name: str) -> dict[str, Any]:
    """One row."""
    make, sequences = MODELS[name]
    model = make()
    assert model.vocabulary is not None
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocabulary.size, (sequences, LENGTH), generator=draw)
    kept, logits = seconds_of(reader_of(model.network, LENGTH, "cpu"), tokens)
    whole, expected = seconds_of(WholePasses(model.network), tokens)
    return {
        "model": name,
        "sequences": sequences,
        "tokens": LENGTH,
        "seconds": round(kept, 1),
        "seconds_whole_passes": round(whole, 1),
        "difference": float((logits - expected).abs().max() / expected.abs().max()),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    torch.set_num_threads(1)
    rows = [measured(name) for name in MODELS]
    FILE.write_text(json.dumps(rows, indent=1) + "\n")
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
