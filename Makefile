# `make bench` and `make test` need only Python 3.10 or newer with venv. A C++ compiler and nvcc are used if available.
# The build reads EMAN_KERNELS_CUDA=on|off and TORCH_CUDA_ARCH_LIST from the environment.
PYTHON ?= python3
BIN := .venv/bin

# `make test` leaves out the tests marked `slow`. Each worker runs whole files, so that fixtures are built only once. While
# OpenMP threads wait they sleep instead of spinning, so that the workers do not slow each other down.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: test test-all bench report methods gpu docs mutants sanitize fuzz load coverage lint clean

test: .venv/.installed
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: .venv/.installed
	$(PYTEST) $(PYTEST_ARGS)

# If `make test` or `make report` has installed everything already, that installation is used.
bench: $(or $(wildcard .venv/.installed),.venv/.bench)
	$(BIN)/python benchmarks/bench_update.py $(BENCH_ARGS)

report: .venv/.installed
	$(BIN)/python benchmarks/report.py $(REPORT_ARGS)

methods: .venv/.installed
	$(BIN)/python benchmarks/methods/study.py --short $(METHODS_ARGS)

# Creates no virtual environment and downloads nothing: PYTHON must have torch, as in containers and on clusters.
gpu:
	$(PYTHON) benchmarks/gpu.py $(GPU_ARGS)

# The guide and the API reference, one HTML page per topic, in build/docs. Neither torch nor a build is needed: the
# docstrings are read from the sources. --strict makes a broken link between two pages an error; --quiet would hide it.
PAGES := README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md CITATION.cff docs csrc/README.md \
	benchmarks/README.md benchmarks/methods/README.md benchmarks/results
docs: .venv/.docs
	rm -rf build/pages build/docs
	mkdir -p build/pages
	cp --parents -r $(PAGES) build/pages
	$(BIN)/python -m properdocs build --strict
	@echo "open build/docs/index.html"

# Mutation tests, sanitizers, fuzzing, load tests and coverage; tests/trust/ describes each. None needs a GPU.
mutants: .venv/.installed
	$(BIN)/pip install --quiet 'cosmic-ray>=8.7' 'coverage>=7.10'
	$(BIN)/python tests/trust/mutants.py $(MUTANTS_ARGS)
	$(BIN)/python tests/trust/random_mutants.py $(RANDOM_MUTANTS)

sanitize: .venv/.installed
	$(BIN)/python tests/trust/sanitize.py $(PYTEST_ARGS)

fuzz: .venv/.installed
	EMAN_KERNELS_FUZZ=$(or $(STEPS),100000) $(BIN)/python -m pytest -s tests/update/test_life.py
	$(BIN)/python tests/trust/fuzz.py $(FUZZ_ARGS)

load: .venv/.installed
	$(BIN)/python tests/trust/load.py $(LOAD_ARGS)

coverage: .venv/.installed
	$(BIN)/pip install --quiet 'coverage>=7.10' gcovr
	$(BIN)/python tests/trust/coverage_report.py $(PYTEST_ARGS)

lint: .venv/.lint
	$(BIN)/pre-commit run --all-files

.venv/bin/python:
	$(PYTHON) -m venv .venv

# An editable install: changed Python files take effect at once, and the extension is rebuilt when its sources change.
# `python -m eman_kernels` prints what was built, or why not.
.venv/.installed: setup.py pyproject.toml docs/requirements.txt $(wildcard csrc/*) | .venv/bin/python
	$(BIN)/pip install --editable '.[bench,test]' -r docs/requirements.txt
	$(BIN)/python -m eman_kernels
	touch $@

# Only what bench_update.py imports by default (torch.compile needs packaging). It skips libraries that are not
# installed, and prints the reason.
.venv/.bench: setup.py pyproject.toml $(wildcard csrc/*) | .venv/bin/python
	$(BIN)/pip install --editable . packaging tabulate torchvision tqdm
	$(BIN)/python -m eman_kernels
	touch $@

.venv/.docs: docs/requirements.txt | .venv/bin/python
	$(BIN)/pip install --quiet -r docs/requirements.txt
	touch $@

.venv/.lint: .pre-commit-config.yaml | .venv/bin/python
	$(BIN)/pip install --quiet pre-commit
	touch $@

clean:
	rm -rf .venv build dist *.egg-info eman_kernels/_C.*
