"""Sizes, drops and speeds in words."""

from gdfq.report.read import Record


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


def faster(metrics: Record) -> float | None:
    """Speed relative to full precision for one image on one thread; None if not measured.

    `gdfq bench` measures it.
    """
    timings = [t for t in metrics.get("bench") or [] if (t["batch"], t["threads"]) == (1, 1)]
    if len(timings) != 2:
        return None
    return float(timings[0]["median"]) / float(timings[1]["median"])
