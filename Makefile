# From a bare Linux machine with Python 3.10 or newer, g++ and make:
#
#   make train    trains a small GPT on real text with npu_xent's loss           (TRAIN_ARGS="--steps 50")
#   make test     runs the tests, and those of cann_sim       (TEST_ARGS="-k contract": some, without cann_sim's)
#   make build    only builds, into .venv
#   make check    formatting and lint, as CI runs them        make format    applies them
#   make clean    removes what the above made
#
# Each sets up what it needs: a virtual environment in .venv, its packages, the extension. PYTHON picks the interpreter;
# TORCH the torch to build against. pip's own variables (PIP_INDEX_URL, ...) apply: where the index offers only CUDA
# builds of torch, point it at one with CPU builds, which are much smaller.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
# With torch_npu installed and no CANN in sight, `import torch` raises unless this is set.
export TORCH_DEVICE_BACKEND_AUTOLOAD ?= 0

SOURCES := $(shell find csrc cmake -type f -not -path 'csrc/ascendc/*') CMakeLists.txt setup.py pyproject.toml
SIM_SOURCES := $(shell find cann_sim/src -type f) cann_sim/CMakeLists.txt cann_sim/setup.py cann_sim/pyproject.toml
CXX_FILES = $(shell find csrc cann_sim benchmarks \( -name '*.h' -o -name '*.cpp' \) -not -path '*/build/*')

.DELETE_ON_ERROR:
.PHONY: help train test build check format clean

help:
	@sed -n '3,8s/^# \{0,1\}//p' Makefile

train: $(VENV)/.train $(VENV)/.build
	@echo "== Training: $(PY) examples/train_lm.py $(TRAIN_ARGS)"
	@$(PY) examples/train_lm.py $(TRAIN_ARGS)

test: $(VENV)/.test $(VENV)/.build $(VENV)/.cann_sim
	@echo "== Testing: pytest $(TEST_ARGS)"
	@$(PY) -m pytest $(TEST_ARGS)
ifeq ($(TEST_ARGS),)
	@echo "== Testing cann_sim"
	@cd cann_sim && ../$(PY) -m pytest
endif

build: $(VENV)/.build

check: $(VENV)/.check
	@echo "== Checking format and lint"
	@$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .

format: $(VENV)/.check
	@$(VENV)/bin/clang-format -i $(CXX_FILES)
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) build dist runs *.egg-info npu_xent/_build.py npu_xent/*.so cann_sim/build cann_sim/*.egg-info
	rm -f cann_sim/cann_sim/toolkit/lib64/*.so

$(VENV)/.created:
	@echo "== Creating a virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "npu_xent needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Use make PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@touch $@

# The stamp carries the version asked for, so that another TORCH is installed and built against.
TORCH_STAMP := $(VENV)/.torch-$(subst /,_,$(TORCH))

$(TORCH_STAMP): $(VENV)/.created
	@echo "== Installing $(TORCH) and the build tools"
	@$(PIP) install "$(TORCH)" numpy "setuptools>=77" cmake ninja
	@touch $@

$(VENV)/.build: $(TORCH_STAMP) $(SOURCES)
	@echo "== Building the extension (two to three minutes the first time)"
	@$(PIP) install --no-build-isolation --no-deps --editable . || \
	  { echo "The build failed. It needs g++ and the headers of Python (Debian and Ubuntu: g++, python3-dev)."; exit 1; }
	@touch $@

$(VENV)/.cann_sim: $(TORCH_STAMP) $(SIM_SOURCES)
	@echo "== Building cann_sim"
	@# compat: an entry in sys.path, which the folder of the same name in the current directory does not shadow.
	@$(PIP) install --no-build-isolation --no-deps --config-settings editable_mode=compat --editable ./cann_sim
	@touch $@

$(VENV)/.train: $(TORCH_STAMP)
	@echo "== Installing what the example needs"
	@$(PIP) install "tokenizers>=0.20" tqdm matplotlib
	@touch $@

$(VENV)/.test: $(VENV)/.train
	@echo "== Installing what the tests need"
	@$(PIP) install "pytest>=8" "hypothesis>=6"
	@touch $@

$(VENV)/.check: $(VENV)/.created
	@echo "== Installing the formatters"
	@$(PIP) install ruff==0.14.5 clang-format==21.1.5
	@touch $@
