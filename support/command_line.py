"""Command lines on the networks of the fixture `place`."""

from pathlib import Path


def arguments(
    place: Path,
    *more: str,
    model: str = "factory",
    weights: str = "w.safetensors",
    out: str = "out",
    command: str = "quantize",
) -> list[str]:
    report = ["--no-report"] if command == "quantize" else []
    return [
        *(command, f"{place}/net.py:{model}", "--weights", f"{place}/{weights}"),
        *("--input", "3x8x8", "--mean", ".5,.5,.5", "--std", ".3,.3,.3"),
        *("--recipe", "paper", "--steps", "4", "--out", f"{place}/{out}", *report, *more),
    ]
