# Nothing but Python, make and a package index is needed.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: install demo test clean

install: .venv/installed

# Torch first and by itself: on an index that has a CPU build, that one then serves all the rest.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

demo: install
	rm -rf demo-run
	$(BIN)/gdfq demo --out demo-run

# Tests run beside one another, one thread each: more threads gain little on small networks.
test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

clean:
	rm -rf .venv demo-run
