"""Measurements; each script runs from the root of the repository as `python -m benchmarks.NAME`."""
