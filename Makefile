# Nothing but Python, make and a package index is needed.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: install demo test check site clean

install: .venv/installed

# Torch first and by itself: on an index that has a CPU build, that one then serves all the rest.
.venv/installed: pyproject.toml requirements/test.lock
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet --constraint requirements/test.lock --editable ".[test]"
	touch $@

# Optional libraries; one that an index does not have is skipped by its tests, with a line. Torch stays
# the one that is there: torchvision asks for another build of it, and its networks need none.
OPTIONAL := docs openvino nncf hf ptcv browser tensorboard audit
.venv/checked: .venv/installed
	$(PIP) freeze | grep '^torch==' > .venv/torch.txt
	for extra in $(OPTIONAL); do \
	    $(PIP) install --quiet --constraint .venv/torch.txt --editable ".[$$extra]" \
	    || echo "not installed: $$extra"; \
	done
	$(PIP) install --quiet --no-deps "torchvision>=0.28" "timm>=1.0.31" \
	    && $(PIP) install --quiet huggingface_hub pyyaml || echo "not installed: torchvision, timm"
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

# What is too long for `make test`, or needs more: the site, the browser, optional libraries.
check: .venv/checked
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m check

site: .venv/checked
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv demo-run site
