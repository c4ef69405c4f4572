# `make bench` and `make test` need nothing but Python 3.10 with venv. A C++ compiler and an nvcc are used where they
# are; EMAN_KERNELS_CUDA=on|off and TORCH_CUDA_ARCH_LIST reach the build from the environment.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test bench report methods gpu docs mutants sanitize fuzz load coverage lint clean

test: .venv/.installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: .venv/.installed
	$(BIN)/python benchmarks/bench_update.py $(BENCH_ARGS)

report: .venv/.installed
	$(BIN)/python benchmarks/report.py $(REPORT_ARGS)

methods: .venv/.installed
	$(BIN)/python benchmarks/methods/study.py --short $(METHODS_ARGS)

# No virtual environment and nothing downloaded: PYTHON is one that has torch, as containers and clusters do.
gpu:
	$(PYTHON) benchmarks/gpu.py $(GPU_ARGS)

# The API reference, from the docstrings.
docs: .venv/.installed
	$(BIN)/python -m pdoc --docformat google --output-directory build/docs eman_kernels eman_kernels.integrations

# Evidence that the tests can fail, and that the thing holds: trust/ says what each does. None of them needs a GPU.
mutants: .venv/.installed
	$(BIN)/python trust/mutants.py $(MUTANTS_ARGS)

sanitize: .venv/.installed
	$(BIN)/python trust/sanitize.py $(PYTEST_ARGS)

fuzz: .venv/.installed
	EMAN_KERNELS_FUZZ=$(or $(STEPS),100000) $(BIN)/python -m pytest -s tests/test_life.py
	$(BIN)/python trust/fuzz.py $(FUZZ_ARGS)

load: .venv/.installed
	$(BIN)/python trust/load.py $(LOAD_ARGS)

coverage: .venv/.installed
	$(BIN)/pip install --quiet 'coverage>=7.10' gcovr
	$(BIN)/python trust/coverage_report.py $(PYTEST_ARGS)

lint: .venv/.lint
	$(BIN)/pre-commit run --all-files

.venv/bin/python:
	$(PYTHON) -m venv .venv

# Editable: Python is taken from here as it is, and the extension is built anew when its sources change.
# The report says what was built, or why not.
.venv/.installed: setup.py pyproject.toml $(wildcard csrc/*) | .venv/bin/python
	$(BIN)/pip install --editable '.[bench,test]'
	$(BIN)/python -m eman_kernels
	touch $@

.venv/.lint: .pre-commit-config.yaml | .venv/bin/python
	$(BIN)/pip install --quiet pre-commit
	touch $@

clean:
	rm -rf .venv build dist *.egg-info eman_kernels/_C.*
