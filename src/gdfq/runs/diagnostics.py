"""The evidence for a run's report: what needs teacher, student and images together.

The folder of a run holds no teacher, so this is measured once, after the run, and written as plain
numbers: JSON, and arrays as npz. The report is made from these files alone.
"""

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gdfq.analysis.accuracy_drop import measure_expected_drop
from gdfq.analysis.candidates import measure_candidates
from gdfq.analysis.images import measure_images
from gdfq.analysis.layers import measure_layers
from gdfq.analysis.observations import Observations
from gdfq.analysis.own_text import measure_text
from gdfq.analysis.predictions import measure_changes
from gdfq.errors import first_line
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.malloc import release_freed_memory
from gdfq.execution.precision import in_full_float32
from gdfq.files.atomic import write_atomically, write_json
from gdfq.graph.capture import Captured
from gdfq.quantized import QuantizedNetwork
from gdfq.runs.names import EVIDENCE, EVIDENCE_ARRAYS

VERSION = 2
"""Of the format of both files."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """Numbers by section (such as `trust`), and arrays as `section.name`.

    A section that could not be measured is in `missing`, with the reason.
    """

    sections: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)


def gather(
    teacher: Captured,
    quantized: QuantizedNetwork,
    memory: MemoryBudget = MemoryBudget(),
) -> Evidence:
    """Measure all that the report shows of a run that has just been made.

    teacher: what it was made from. A section that fails is left out and says why: the run is
    worth more than its report.
    """
    observations = quantized.observations
    if observations is None:
        reason = "the network was loaded from a file, which remembers no images"
        return Evidence(missing=dict.fromkeys(("trust", "layers", "images", "test"), reason))
    measures = _measures(teacher, quantized, observations, memory)
    sections: dict[str, Any] = {}
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    missing: dict[str, str] = {}
    for name, measured in measures.items():
        started = time.perf_counter()
        release_freed_memory()
        try:
            with in_full_float32(teacher.device):
                found = asdict(measured())
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {first_line(error)}"
            continue
        ours = {key: value for key, value in found.items() if isinstance(value, np.ndarray)}
        arrays |= {f"{name}.{key}": value for key, value in ours.items()}
        sections[name] = {key: value for key, value in found.items() if key not in ours}
        sections[name]["seconds"] = round(time.perf_counter() - started, 3)
    if observations.denoiser and observations.samples is None:
        missing["samples"] = "none were asked for"
    elif observations.tested is None and not observations.denoiser:
        missing["test"] = "no labelled test images were given"
    return Evidence(sections, arrays, missing)


def _measures(
    teacher: Captured, quantized: QuantizedNetwork, observations: Observations, memory: MemoryBudget
) -> dict[str, Callable[[], Any]]:
    """What is measured, by its section."""
    preprocessing, samples = quantized.card.preprocessing, observations.samples
    layers: dict[str, Callable[[], Any]] = {
        "layers": lambda: measure_layers(
            observations.teacher, quantized.network, *observations.inputs, memory=memory
        )
    }
    if observations.denoiser:
        return layers if samples is None else {"samples": lambda: samples} | layers
    if teacher.vocabulary is not None:
        return {
            "text": lambda: measure_text(
                teacher,
                observations.teacher,
                quantized.network,
                observations.inputs,
                quantized.card.seed,
                observations.decode,
            ),
            **layers,
        }
    measures: dict[str, Callable[[], Any]] = {
        "trust": lambda: measure_expected_drop(
            teacher, quantized.network, seed=quantized.card.seed, memory=memory
        ),
        **layers,
        "images": lambda: measure_images(
            teacher, observations.images, observations.labels, preprocessing, memory
        ),
    }
    candidates, screening = observations.candidates, observations.screening
    if candidates is not None and screening is not None:
        measures["candidates"] = lambda: measure_candidates(candidates, screening)
    tested = observations.tested
    if tested is not None:
        measures["test"] = lambda: measure_changes(tested, preprocessing)
    return measures


def write_evidence(evidence: Evidence, folder: Path) -> None:
    """Write both files into a folder, each whole or not at all."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = dict(evidence.arrays)
    np.savez_compressed(buffer, **arrays)
    write_atomically(folder / EVIDENCE_ARRAYS, buffer.getvalue())
    document = {"version": VERSION, "missing": dict(evidence.missing), **evidence.sections}
    write_json(folder / EVIDENCE, document)
