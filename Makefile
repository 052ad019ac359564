# `make demo` and `make test` need Python 3.11 or newer and nothing else: the first call makes .venv, the next ones start at once.
# Where pip's index offers only large CUDA builds of torch, a machine without a GPU saves gigabytes with
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

# The first interpreter that is new enough; `make PYTHON=/path/to/python3.12 demo` chooses another one.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BENCHMARKS ?= $(sort $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)))
PYTEST_ARGS ?=
# One process per core, each of which takes the next test that nobody has begun; '-n 0' runs all in one process.
PYTEST_WORKERS ?= -n auto --dist worksteal

BIN := .venv/bin
# Newer than what it depends on: the environment is up to date and pip, which takes seconds to find that out, is not called.
INSTALLED := .venv/.installed
# The kernels in C; installing the project compiles them.
KERNEL_TESTS := tests/packing/test_backends.py tests/packing/test_backend_native.py \
	tests/packing/test_native_blocks.py tests/packing/test_marked_elements.py tests/ops/test_rows.py \
	tests/ops/test_depthwise.py tests/ops/test_pointwise.py tests/ops/test_sparse_products.py
KERNELS := fedmef_fx/native/compile_library.py $(wildcard fedmef_fx/native/src/*)
ECOSYSTEM := .venv-ecosystem
FLOWER := .venv-flower
DOCS := .venv-docs
# What ExecuTorch needs to write and run a training step; it asks for much more, for other platforms.
EXECUTORCH := executorch flatbuffers pandas python-dateutil pytz ruamel.yaml sympy tabulate torchao tzdata

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-fast test-slow test-native test-ecosystem test-flower lint style types format bench docs docs-images clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(INSTALLED): pyproject.toml constraints.txt setup.py wheel_backend.py $(KERNELS)
	test -x $(BIN)/pip || $(or $(PYTHON),$(error no Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3)) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,viz]'
	touch $@

install: $(INSTALLED)  ## Make .venv and install the project into it

demo: $(INSTALLED)  ## Train a small federation, freeze it, export it: about a minute
	$(BIN)/fedmef-fx demo

# Threads that wait by spinning slow each other down many times over when another process wants a core.
test test-all test-fast test-slow test-ecosystem test-flower: export OMP_WAIT_POLICY ?= passive

test: $(INSTALLED)  ## Check style and types, and run every test; PYTEST_ARGS='-k masks' narrows it down
	@$(MAKE) --no-print-directory style
	@$(MAKE) --no-print-directory -j2 types test-all || { echo 'make test: failed; errors of mypy stand above the tests' >&2; exit 1; }

test-all: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_WORKERS) $(PYTEST_ARGS)

test-fast: $(INSTALLED)  ## Run only the tests that take a few seconds at most
	$(BIN)/python -m pytest $(PYTEST_WORKERS) -m 'not slow' $(PYTEST_ARGS)

test-slow: $(INSTALLED)  ## Run only the slow tests
	$(BIN)/python -m pytest $(PYTEST_WORKERS) -m slow $(PYTEST_ARGS)

# Leaks are not looked for: Python frees nothing when it ends. The sanitizers' runtime has to be there before Python starts.
test-native: export FEDMEF_FX_KERNELS := build/sanitized
test-native: export ASAN_OPTIONS := detect_leaks=0
test-native: $(INSTALLED)  ## Run the kernels' tests with checks of addresses and undefined behaviour; needs gcc
	CC=gcc $(BIN)/python fedmef_fx/native/compile_library.py --sanitize build/sanitized
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		$(BIN)/python -m pytest -p no:randomly $(KERNEL_TESTS) $(PYTEST_ARGS)

test-ecosystem: $(ECOSYSTEM)/.installed  ## Run the tests with accelerate, Lightning, peft, timm, opacus and transformers
	$(ECOSYSTEM)/bin/python -m pytest tests/ecosystem tests/federated/test_privacy.py $(PYTEST_WORKERS) $(PYTEST_ARGS)

# An environment beside .venv, which it sees: the libraries do not change what `make test` runs with. timm asks for a
# torchvision with compiled operators, which indexes do not have for every build of torch; its Python code is enough.
# dp-accounting asks for an attrs of 2023, and does with today's.
$(ECOSYSTEM)/.installed: $(INSTALLED) constraints-ecosystem.txt
	test -x $(ECOSYSTEM)/bin/python || $(BIN)/python -m venv $(ECOSYSTEM)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(ECOSYSTEM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	$(ECOSYSTEM)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -c constraints-ecosystem.txt \
		$(shell sed -n '/^ecosystem = \[/,/^\]/s/^ *"\(.*\)",/'"'\1'"'/p' pyproject.toml)
	$(ECOSYSTEM)/bin/python -m pip install --disable-pip-version-check -c constraints-ecosystem.txt --no-deps timm torchvision dp-accounting dm-tree
	$(ECOSYSTEM)/bin/python -m pip install --disable-pip-version-check -c constraints-ecosystem.txt --no-deps $(EXECUTORCH) \
		|| echo "no ExecuTorch for this platform: its tests will be skipped"
	npm install --silent --no-audit --no-fund --ignore-scripts --prefix $(ECOSYSTEM) onnxruntime-web@1.30 onnxruntime-node@1.30 \
		|| echo "no npm here: the tests of the web example will be skipped"
	touch $@

test-flower: $(FLOWER)/.installed  ## Run the tests with Flower and Ray; PYTEST_ARGS="-m 'not slow'" leaves real processes out
	$(FLOWER)/bin/python -m pytest tests/flower $(PYTEST_ARGS)

# Beside .venv, which it sees, but for what Flower wants older: that it has in versions of its own.
$(FLOWER)/.installed: $(INSTALLED) constraints-flower.txt
	test -x $(FLOWER)/bin/python || $(BIN)/python -m venv $(FLOWER)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(FLOWER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_beside.pth"
	$(FLOWER)/bin/python -m pip install --disable-pip-version-check --ignore-installed -c constraints-flower.txt \
		'flwr[simulation]' typer rich click protobuf packaging
	touch $@

lint: style types  ## Check style and types

style: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/mypy

format: $(INSTALLED)  ## Rewrite the files in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(INSTALLED)  ## Run every benchmark, or BENCHMARKS='benchmarks/one.py'
	@test -n '$(BENCHMARKS)' || { echo 'make bench: no script in benchmarks/' >&2; exit 1; }
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

docs: $(DOCS)/.installed  ## Make the site in build/site; a broken link or an undocumented public name fails, tutorials run
	$(DOCS)/bin/mkdocs build --strict --site-dir build/site

# Beside .venv, which it sees: tutorials run with what the project is installed with.
$(DOCS)/.installed: $(INSTALLED) constraints-docs.txt
	test -x $(DOCS)/bin/python || $(BIN)/python -m venv $(DOCS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(DOCS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	$(DOCS)/bin/python -m pip install --disable-pip-version-check -c constraints-docs.txt \
		$(shell sed -n '/^docs = \[/,/^\]/s/^ *"\(.*\)",/'"'\1'"'/p' pyproject.toml)
	touch $@

docs-images: $(INSTALLED)  ## Make the pictures of the docs again; needs Chromium and its driver
	$(BIN)/python docs/make_images.py

clean:  ## Remove build products and caches; .venv stays
	rm -rf build dist *.egg-info .coverage .hypothesis .mypy_cache .nox .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
