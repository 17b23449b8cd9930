"""Code that tests and benchmarks share. It imports gdfq, and neither tests nor benchmarks."""
