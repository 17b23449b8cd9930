"""The plan of a run: every option parsed and checked once.

The command line, `gdfq.quantize`, `gdfq.generate`, `doctor` and the benchmarks resolve their
options here and pass the values on. After a plan is made, nothing parses an option or loads a
network again.
"""
