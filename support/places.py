"""Where the repository and the real networks are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
"""Trained networks and test images; absent on most machines."""
RESULTS = ROOT / "benchmarks" / "results"
CACHE = ROOT / "benchmarks" / "cache"
"""Images and students that several measurements use; not in version control."""
