"""The evidence of a run as files: numbers as JSON, arrays as npz."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from gdfq.analysis.evidence import Evidence
from gdfq.files.atomic import write_atomically, write_json
from gdfq.runs.names import EVIDENCE, EVIDENCE_ARRAYS

VERSION = 1
"""Of the format of both files."""


def write_evidence(evidence: Evidence, folder: Path) -> None:
    """Write both files into a folder, each whole or not at all."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = dict(evidence.arrays)
    np.savez_compressed(buffer, **arrays)
    write_atomically(folder / EVIDENCE_ARRAYS, buffer.getvalue())
    document = {"version": VERSION, "missing": dict(evidence.missing), **evidence.sections}
    write_json(folder / EVIDENCE, document)
