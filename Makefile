# Each target sets up .venv if it is missing or older than pyproject.toml and constraints.txt.
#
#   PYTHON=python3.12        the interpreter that creates .venv
#   VENV_PYTHON=python3      run with this interpreter, without .venv and without installing anything;
#                            for example on a GPU machine that has torch but no network
#   ARGS="-k order"          passed on to the command

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3

ifdef VENV_PYTHON
READY :=
RUN := PYTHONPATH=src $(VENV_PYTHON)
else
READY := .venv/.ready
RUN := .venv/bin/python
endif

# -P with -m keeps the root off the path. Its folder `kernels` would otherwise shadow Hugging Face's package of that name.
.PHONY: help demo test test-under-load lint house tables bench gpu-check setup clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 24

demo: $(READY) ## score the examples, order a prompt, and save a figure
	@$(RUN) examples/demo.py $(ARGS)

test: $(READY) ## run all tests in two processes
	@OMP_NUM_THREADS=1 $(RUN) -P -m pytest --numprocesses 2 --dist worksteal $(ARGS)

test-under-load: $(READY) ## run tests five times while eight processes keep the machine busy: ARGS="tests/scoring -k killed"
	@OMP_NUM_THREADS=1 $(RUN) tests/support/under_load.py $(ARGS)

lint: $(READY) ## check style and types
	@$(RUN) -P -m ruff check
	@$(RUN) -P -m ruff format --check
	@$(RUN) -P -m mypy

house: $(READY) ## measure the code: sizes, cycles, words, symbols; ARGS="--list words" lists the hits of one row
	@$(RUN) tests/support/house.py $(ARGS)

tables: $(READY) ## regenerate the tables of the documentation from the source
	@$(RUN) docs/generate_tables.py

bench: $(READY) ## measure scoring, kernels, sparse attention, calibration, the ablation and the loader (some minutes)
	@$(RUN) benchmarks/speed/scoring.py --quick $(ARGS)
	@$(RUN) benchmarks/speed/sparsity_kernels.py --quick $(ARGS)
	@$(RUN) benchmarks/speed/sparse_attention/sparse_attention.py --quick $(ARGS)
	@$(RUN) benchmarks/speed/calibration.py --quick $(ARGS)
	@$(RUN) benchmarks/speed/ablation.py --quick $(ARGS)
	@$(RUN) benchmarks/speed/loader/loader.py --quick $(ARGS)

gpu-check: $(READY) ## check and measure the Triton kernels on this machine's GPU
	@$(RUN) benchmarks/speed/gpu_check.py $(ARGS)

setup: $(READY) ## set up .venv only

clean: ## remove the files that builds, tests and runs leave; keep .venv
	@rm -rf dist out .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "sparsort needs Python 3.11 or newer, and $(PYTHON) is older. Run: make PYTHON=python3.12 …" >&2; exit 1; }
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "Installing sparsort and its tools into .venv (minutes the first time) …"
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
