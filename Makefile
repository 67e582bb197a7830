# Each target makes or completes .venv by itself. Variables: PYTHON=python3.12 chooses the interpreter that .venv is
# made from, ARGS="..." is passed on to the program behind the target.

PYTHON ?= python3
ARGS ?=
VENV_PYTHON := .venv/bin/python
VLLM_PYTHON ?= python3.11
VLLM_VENV ?= .venv-vllm

.PHONY: help setup repro matrix test test-all test-gpu test-vllm bench bundle lint clean distclean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup: .venv/.ready-repro  ## make .venv with torch (CPU build on a machine without a GPU), and no more

repro: .venv/.ready-repro  ## the hang, its diagnosis and the fixed run, on 8 ranks without a GPU
	@$(VENV_PYTHON) -m repro run metadata_rebuild --variant all $(ARGS)

matrix: .venv/.ready-repro  ## which of layout, kernel backends and kernel cache makes a start slow; needs a compiler
	@$(VENV_PYTHON) -m repro matrix $(ARGS)

test: .venv/.ready-test  ## all tests but the slowest and those that need a GPU
	$(VENV_PYTHON) -m pytest -n 3 --dist worksteal $(ARGS)

test-all: .venv/.ready-test-all  ## every test; what the machine cannot run is skipped
	HMR_SCENARIO_SEEDS=$${HMR_SCENARIO_SEEDS:-5} $(VENV_PYTHON) -m pytest -m "" $(ARGS)

test-gpu: .venv/.ready-test  ## what needs a CUDA device; all skipped without one
	$(VENV_PYTHON) -m pytest -m gpu $(ARGS)

test-vllm: .venv/.ready-test  ## serve vLLM's CPU build, compare its schedule, inject faults; 3.5 GB, 30 minutes
	@$(VLLM_PYTHON) scripts/setup_vllm.py $(VLLM_VENV)
	$(VENV_PYTHON) tests/vllm/check.py --vllm $(VLLM_VENV) $(ARGS)

bench: .venv/.ready-bench  ## what the verdict, the watching, the kernels and the model cost, beside a peer in the same run
	@to=benchmarks/results; on=$$($(VENV_PYTHON) benchmarks/machine.py) || exit; mkdir -p $$to; missed=0; \
	run() { echo "$$@"; $(VENV_PYTHON) "$$@" || missed=1; }; \
	run benchmarks/bench_verdict.py --json $$to/verdict_$$on.json; \
	run benchmarks/bench_diagnose.py --json $$to/diagnose_$$on.json; \
	run benchmarks/bench_record.py --json $$to/record_$$on.json; \
	run benchmarks/bench_engine.py --json $$to/engine_$$on.json; \
	run benchmarks/bench_kernels.py --json $$to/kernels_$$on.json; \
	run benchmarks/bench_model.py --json $$to/model_$$on.json; \
	run benchmarks/kernel_registers.py --json $$to/kernel_registers_$$on.json; \
	run benchmarks/bench_kernels_gpu.py --json $$to/kernels_gpu_$$on.json; \
	run benchmarks/plots.py $$to/*_$$on.json; exit $$missed

bundle: .venv/.ready-repro  ## the newest run as one zip to attach to a bug report
	@$(VENV_PYTHON) -m repro bundle runs/latest $(ARGS)

lint: .venv/.ready-lint  ## ruff, its formatter, mypy, and which room may import which
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(VENV_PYTHON) -m mypy
	.venv/bin/lint-imports

clean:  ## remove runs, build products and caches
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./.venv -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv and .venv-vllm too
	rm -rf .venv .venv-vllm

.venv/.ready-%: pyproject.toml setup.py scripts/setup_venv.py
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("setup: Python 3.11 or newer is needed, \
	this is %d.%d; name another: make PYTHON=python3.12" % sys.version_info[:2])'
	@$(PYTHON) scripts/setup_venv.py $*
