# `make demo` and `make test` set up everything they need; see README.md.
#
#   PYTHON  interpreter that makes the environment (3.11 or newer)
#   VENV    where the environment lives; an existing one is used as it is
#   TORCH   pip requirement for torch, or `installed` for the torch that PYTHON or VENV already has
#   ARGS    extra arguments for lychee demo or pytest

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
# Byte code is made as modules are first imported: most of what torch brings never is.
INSTALL := $(BIN)/python -m pip -qq --disable-pip-version-check install --no-compile
READY := $(VENV)/.lychee-ready
# Pins the torch that was chosen, so that no later dependency solve can replace it.
CONSTRAINT := $(VENV)/.lychee-torch
VENV_FLAGS := $(if $(filter installed,$(TORCH)),--system-site-packages)
SOURCES := $(shell find csrc -type f 2>/dev/null)
CPP_FILES := find csrc tests benchmarks -type f \
	\( -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' \) -print0

# Read by the shell from its environment, so that a requirement may hold < and > and pip options.
export TORCH
define CHECK_PYTHON
import sys
if sys.version_info < (3, 11):
    sys.exit(f'PYTHON: expected 3.11 or newer, got {sys.version.split()[0]} ({sys.executable})')
endef
export CHECK_PYTHON
define PRINT_TORCH
import importlib.metadata as metadata, os, sys
try:
    print('# {}\ntorch=={}'.format(os.environ['TORCH'], metadata.version('torch')))
except metadata.PackageNotFoundError:
    sys.exit(f'TORCH: expected torch to be installed already, got none in {sys.prefix}')
endef
export PRINT_TORCH

.DELETE_ON_ERROR:
.PHONY: demo test bench lint format clean FORCE

demo: $(READY)
	@$(BIN)/lychee demo $(ARGS)

# Without ARGS on every core; a file's tests stay together, as they share what they compile. With
# ARGS as pytest does it, in one process: ARGS="-n 2 --dist loadfile tests/kernels" spreads them.
test: $(READY)
	@$(BIN)/python -m pytest $(or $(ARGS),-n auto --maxprocesses 4 --dist loadfile)

bench: $(READY)
	@$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(CPP_FILES) | xargs -0 -r $(BIN)/clang-format --dry-run -Werror

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(CPP_FILES) | xargs -0 -r $(BIN)/clang-format -i

clean:
	rm -rf $(READY) .venv build dist *.egg-info lychee_kernels/*.so .pytest_cache .ruff_cache

# New metadata installs again; changed sources alone rebuild only what depends on them.
$(READY): $(CONSTRAINT) pyproject.toml setup.py $(SOURCES)
	@echo 'Building the kernels ...'
	@$(if $(filter-out $(SOURCES),$?), \
		$(INSTALL) --constraint $(CONSTRAINT) --no-build-isolation --editable '.[dev]', \
		$(BIN)/python setup.py --quiet build_ext --inplace)
	@touch $@

# Written when TORCH changes: the request in the first line, the version it gave in the second.
$(CONSTRAINT): FORCE
	@if ! head -n 1 $@ 2>/dev/null | grep -qxF "# $$TORCH"; then set -ef; \
		echo "Preparing $(VENV) with torch ($$TORCH) ..."; \
		test -x $(BIN)/pip || { $(PYTHON) -c "$$CHECK_PYTHON"; $(PYTHON) -m venv $(VENV_FLAGS) $(VENV); }; \
		if [ "$$TORCH" != installed ]; then $(INSTALL) $$TORCH; fi; \
		$(INSTALL) 'setuptools>=77' wheel ninja; \
		$(BIN)/python -c "$$PRINT_TORCH" > $@; \
	fi
