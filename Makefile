# Everything happens in .venv; stamp files there make a second call instant.
.DEFAULT_GOAL := help

# The first Python that is new enough; PYTHON=… overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# First and alone: on a range, a later dependency may pull another build. On a GPU machine this is the CUDA build.
TORCH ?= torch==2.13.0

venv := .venv/bin/python
pip := $(venv) -m pip --disable-pip-version-check -qq
sources := pyproject.toml CMakeLists.txt $(wildcard kernels/csrc/*)

.PHONY: help demo test test-all lint docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

demo: .venv/.installed  ## train a federation on embedded data
	@.venv/bin/fedmoe train configs/demo.toml

test: lint  ## lint, then all tests
	@FEDMOE_REQUIRE_NATIVE=1 $(venv) -m pytest --numprocesses auto --dist loadfile

test-all: test  ## test, then the C++ unit tests under sanitizers, and a long fuzz of the extension
	@for preset in plain address undefined thread; do cmake --workflow --preset $$preset || exit 1; done
	@FEDMOE_FUZZ=5000 $(venv) -m pytest tests/test_native.py

lint: .venv/.installed  ## style, types and the direction of imports
	@$(venv) -m ruff check .
	@$(venv) -m ruff format --check .
	@$(venv) -m mypy
	@.venv/bin/lint-imports

docs: .venv/.docs  ## build the documentation into build/docs
	@$(venv) -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs build/docs
	@echo "build/docs/index.html"

clean:  ## remove the environment and everything built (runs/ stays)
	@rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
	@find . -name __pycache__ -prune -exec rm -rf {} +

.venv/.torch:
	@$(if $(PYTHON),,echo "make: no Python 3.11 or later found; install one, or say which: make PYTHON=/path/to/python3" >&2; exit 1)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: Python 3.11 or later is needed, $(PYTHON) is not" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || \
		{ echo "make: Python.h is missing; install the headers of $(PYTHON) (Debian, Ubuntu: python3-dev)" >&2; exit 1; }
	@compiler=$${CXX:-c++}; command -v $${compiler%% *} >/dev/null || \
		{ echo "make: no C++ compiler ($$compiler) found; install g++ or clang, or set CXX" >&2; exit 1; }
	@echo "Creating .venv and installing $(TORCH)"
	@$(PYTHON) -m venv .venv
	@$(pip) install "$(TORCH)"
	@touch $@

.venv/.installed: .venv/.torch $(sources)
	@echo "Building and installing fedmoe"
	@$(pip) install --editable '.[dev]'
	@touch $@

.venv/.docs: .venv/.installed
	@echo "Installing what builds the documentation"
	@$(pip) install --editable '.[docs]'
	@touch $@
