# Nothing but Python, make and a package index is needed. `make` alone lists the targets.
PYTHON ?= python3
TORCH ?= torch==2.13.0
LOCK ?= requirements/test.lock
SEED ?= 0
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install hooks demo test unit check format lint types docs coverage fuzz zoo audit clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=$(PYTHON) TORCH=$(TORCH) LOCK=$(LOCK)"

install: .venv/installed ## Create .venv with the package and what its tests need

# Torch first and by itself: on an index that has a CPU build, that one then serves all the rest.
# torch.txt holds it in place, because an extra may ask for another build of it.
.venv/installed: pyproject.toml $(LOCK)
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet --constraint $(LOCK) --editable ".[test]"
	$(PIP) freeze | grep '^torch==' > .venv/torch.txt
	touch $@

.venv/dev: .venv/installed
	$(PIP) install --quiet --constraint .venv/torch.txt --constraint $(LOCK) --editable ".[dev]"
	touch $@

.venv/docs: .venv/installed
	$(PIP) install --quiet --constraint .venv/torch.txt --constraint $(LOCK) --editable ".[docs]"
	touch $@

.venv/audit: .venv/installed
	$(PIP) install --quiet --constraint .venv/torch.txt --editable ".[audit]"
	touch $@

# An optional library that an index does not have is skipped by its tests, with a line.
# torchvision asks for another build of torch, and its networks need none.
OPTIONAL := docs diffusion openvino litert-micro nncf hf compressed-tensors ptcv browser tensorboard audit
.venv/checked: .venv/installed
	for extra in $(OPTIONAL); do \
	    $(PIP) install --quiet --constraint .venv/torch.txt --editable ".[$$extra]" \
	    || echo "not installed: $$extra"; \
	done
	$(PIP) install --quiet --no-deps "torchvision>=0.28" "timm>=1.0.31" \
	    && $(PIP) install --quiet huggingface_hub pyyaml || echo "not installed: torchvision, timm"
	touch $@

# Runtimes that files must also run in, each in a folder of its own: tests start a process for each.
# Versions before 1.19 need the first NumPy.
OLD_RUNTIMES := onnxruntime==1.16.3 onnxruntime==1.18.1
RUNTIMES := $(foreach v,1.20.1 1.21.1 1.22.1 1.23.2 1.24.4,onnxruntime==$(v)) tract==0.23.9
# With what they need beside the installed packages; other dependencies of ExecuTorch are for other devices.
COMPILERS := executorch==1.5.1,torchao==0.18.0,ruamel.yaml,tabulate apache-tvm==0.27.0.post1,apache-tvm-ffi==0.1.15.post2
.venv/runtimes/installed: .venv/installed
	for runtime in $(OLD_RUNTIMES) $(RUNTIMES); do \
	    $(PIP) install --quiet --no-deps --target ".venv/runtimes/$$runtime" "$$runtime" \
	    || echo "not installed: $$runtime"; \
	done
	for runtime in $(OLD_RUNTIMES); do \
	    $(PIP) install --quiet --no-deps --target ".venv/runtimes/$$runtime" "numpy<2" \
	    || { rm -r ".venv/runtimes/$$runtime"; echo "not installed: numpy<2"; }; \
	done
	for runtime in $(COMPILERS); do \
	    $(PIP) install --quiet --no-deps --target ".venv/runtimes/$${runtime%%,*}" $$(echo "$$runtime" | tr , ' ') \
	    || echo "not installed: $$runtime"; \
	done
	mkdir -p .venv/runtimes && touch $@

# The JavaScript that examples/web needs, in the version that it names.
.venv/web/installed: examples/web/package.json .venv/installed
	mkdir -p .venv/web && cp examples/web/package.json .venv/web/
	npm install --prefix .venv/web --ignore-scripts --no-audit --no-fund --silent \
	    || echo "not installed: onnxruntime-web"
	touch $@

hooks: .venv/dev ## Run format, lint and types before each commit
	$(BIN)/pre-commit install

demo: install ## Train a small network, lose its data, quantize it (about two minutes)
	rm -rf demo-run
	$(BIN)/gdfq demo --out demo-run

test: lint types unit ## Lint, types and all tests of `make unit`

# Tests run beside one another, one thread each: more threads gain little on small networks.
unit: install ## The tests alone
	$(PYTEST)

check: .venv/checked .venv/runtimes/installed .venv/web/installed ## Tests that take long or need optional libraries: site, browser, more networks
	$(PYTEST) -m check

format: install ## Format the code and apply the fixes of the linter
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: install ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install ## Check types (mypy, strict)
	$(BIN)/mypy

docs: .venv/docs ## Build the documentation in site/; a warning is an error
	$(BIN)/mkdocs build --strict

coverage: .venv/dev ## The tests of `make unit` with branch coverage; fails below the floor
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-report=xml

fuzz: install ## Read 100,000 damaged files (some minutes; SEED=n chooses others)
	mkdir -p .fuzz
	$(BIN)/python -m benchmarks.fuzz --seed $(SEED) --out .fuzz/seed-$(SEED).json

zoo: .venv/checked ## Measure every architecture of the zoo again (two hours; changes results/zoo.json)
	$(BIN)/python -m benchmarks.zoo --only :
	! grep -B 2 '"bug"' benchmarks/results/zoo.json

audit: .venv/audit ## Ask the package index for known vulnerabilities of the locked versions
	$(BIN)/pip-audit --no-deps --disable-pip --requirement $(LOCK)

clean: ## Remove .venv and everything that the targets write
	rm -rf .venv demo-run site .fuzz .coverage .coverage.* coverage.xml
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
