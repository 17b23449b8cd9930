"""Sizes, drops and speeds in words."""

from gdfq.report.read import Record
from gdfq.runs.names import ONNX_FILE


def size_words(count: float) -> str:
    """A number of bytes with its unit."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    kib = count / 1024
    return f"{kib:.0f} KiB" if kib >= 10 else f"{kib:.1f} KiB"


def smaller(before: float, after: float) -> str:
    """The ratio of two sizes in words."""
    if after > before:
        return f"{after / before:.1f} times larger"
    return f"{before / after:.1f} times smaller"


def lost_or_gained(points: float) -> str:
    """A drop of accuracy in words."""
    return f"{abs(points):.2f} points {'lost' if points >= 0 else 'gained'}"


def errors_by_output(student: Record) -> dict[str, float]:
    """The relative error of each output in percent, by what it was measured on.

    Behind a sigmoid, whose equal decisions are known, that is the logits of the output.
    """
    decided = student.get("decisions_percent") or {}
    errors = student.get("error_percent") or {}
    return {
        f"logits of {name}" if name in decided else name: error for name, error in errors.items()
    }


def faster(metrics: Record, name: str) -> float | None:
    """Speed relative to full precision for one image on one thread; None if not measured.

    `gdfq bench` measures it.

    Args:
        metrics: The metrics of a run.
        name: Name of its file.
    """
    timings = [t for t in metrics.get("bench") or [] if (t["batch"], t["threads"]) == (1, 1)]
    measured = [t for t in timings[1:] if _file_of(t) == name]
    if not measured:
        return None
    return float(timings[0]["median"]) / float(measured[0]["median"])


def _file_of(timing: Record) -> object:
    """Return the file that was measured. Older versions measured student.onnx alone."""
    return timing.get("file") if "runtime" in timing else ONNX_FILE
