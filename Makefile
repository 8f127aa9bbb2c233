# make demo | test | lint | bench ...: each sets up what it needs first. `make help` lists them all.
#
#   TORCH='torch==2.13.0'   what pip is asked for, once; e.g. TORCH='torch --index-url URL'
#   PYTHON=python3          the interpreter that .venv is made from
#   VENV=                   (empty) use $(PYTHON) as it is: nothing is installed, no network
#   JOBS=2                  compilers and test workers at a time
#   ARGS='-k windows -x'    handed on to pytest or the benchmarks

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
CORES := $(shell nproc 2>/dev/null || echo 2)
JOBS ?= $(shell echo $$(( $(CORES) < 8 ? $(CORES) : 8 )))
ARGS ?=

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
export MAX_JOBS ?= $(JOBS)
export HF_HUB_OFFLINE ?= 1

ifeq ($(VENV),)
PY := $(PYTHON)
STAMPS := build/.stamps
READY = $(BUILT)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
STAMPS := $(VENV)/.stamps
READY = $(BUILT) $(STAMPS)/installed
export PATH := $(abspath $(VENV))/bin:$(PATH)
endif
PIP := $(PY) -m pip install --disable-pip-version-check

# The extension lies in the tree, so it has one stamp for all environments, named after what it was
# built with.
BUILT_WITH := $(PY) $(HISA_CUDA) $(HISA_HOPPER) $(HISA_WERROR) $(TORCH_CUDA_ARCH_LIST)
BUILT := build/.stamps/built-$(firstword $(shell echo '$(BUILT_WITH)' | cksum))

# One short line per compiled file instead of the compiler's whole command line; V=1 shows it.
SHORT := $(if $(V),cat,sed -uE \
  -e 's%^(\[[0-9]+/[0-9]+\] )?[^ ]*(\+\+|cc|nvcc) .* -c ([^ ]+) -o .*%  compile \1\3%' \
  -e 's%^[^ ]*(\+\+|cc) .*-shared .* -o ([^ ]+) .*%  link \2%' \
  -e 's%$(CURDIR)/%%g' -e '/^ninja: (no work|Enter)/d' -e '/^(running|building|copying) /d')

# Only the names of what pip brings.
NAMES := $(if $(V),cat,sed -uEn 's%^ *(Collecting|Processing) ([^ ]*/)?([^ ]+).*%  \3%p')

# Workers only where pytest-xdist is there; one compute thread for each of them.
WORKERS = $$($(PY) -c 'import xdist; print("--numprocesses $(JOBS) --dist worksteal")' 2>/dev/null)
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest $(WORKERS)

.PHONY: help demo test test-long test-gpu-long test-cuda-portable test-cuda-fp8 lint format docs \
  bench build sanitize sanitize-cuda clean

help: ## this list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

demo: $(READY) ## HISA inside a small DeepSeek-V3.2, on real text (examples/quickstart.py)
	$(PY) examples/quickstart.py

test: $(READY) ## the fast suite
	$(PYTEST) $(ARGS)

test-long: $(READY) ## the long versions of the tests (hours)
	$(PYTEST) -m long $(ARGS)

CUDA_FAMILIES := cuda,cuda-many,cuda-portable,cuda-portable-many
test-gpu-long: $(READY) sanitize-cuda ## the long versions on a GPU, and sanitize-cuda (an hour)
	$(PYTEST) -m long --families $(CUDA_FAMILIES) tests/test_*.py $(ARGS)

test-cuda-portable: $(READY) ## the fast suite on a GPU, on the portable kernels
	$(PYTEST) --families cuda-portable,cuda-portable-many -m 'gpu and not long' $(ARGS)

# What other GPUs run, on the one that is here: builds of their own, beside the normal one.
# $(call test_fp8,MACRO)
define test_fp8
@echo '== hisa._C without the kernels for Hopper, $(1)'
@HISA_CUDA=1 HISA_HOPPER=0 NVCC_APPEND_FLAGS=-D$(1) $(PY) -W ignore setup.py -q \
  build_py --build-lib build/$(1)/lib \
  build_ext --build-lib build/$(1)/lib --build-temp build/$(1)/temp 2>&1 | $(SHORT)
HISA_TESTED=$(CURDIR)/build/$(1)/lib $(PYTEST) -o pythonpath='build/$(1)/lib .' \
  --import-mode=append --families cuda,cuda-many -m 'gpu and not long' $(FP8_TESTS) $(ARGS)
endef

FP8_TESTS = -k 'fp8 or float8 or exact or right_build' \
  $(addprefix tests/test_,$(addsuffix *.py,cuda_dispatch t01 t02 t03 t05 t06 t09 t10 t12 t16))
test-cuda-fp8: $(READY) ## the fast fp8 tests on what sm_80 and sm_89 would run
	$(call test_fp8,HISA_FP8_MMA)
	$(call test_fp8,HISA_NO_FP8_CVT)

lint: $(READY) ## ruff, mypy and clang-format, changing nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	find csrc benchmarks tests/simt -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs clang-format --dry-run -Werror

format: $(READY) ## rewrite Python and C++ to the project's format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	find csrc benchmarks tests/simt -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs clang-format -i

docs: $(READY) ## the documentation site, in build/docs
	$(PY) -m sphinx -W --keep-going -q -b html docs build/docs

bench: $(READY) ## the benchmarks (ARGS=--help lists them)
	$(PY) -m benchmarks $(ARGS)

build: $(READY) ## compile the extension into the working tree

# A second build of its own; the normal one stays as it is. The interpreter is not instrumented, so
# the runtimes are preloaded (libstdc++ too: exceptions are intercepted), and its own leaks ignored.
# Left out: what measures memory, reuse of memory or time, none of which is itself here.
SANITIZERS = $(foreach l,asan ubsan stdc++,$(shell $(or $(CXX),c++) -print-file-name=lib$(l).so))
SANITIZED := build/sanitize/lib
REPORT := $(CURDIR)/build/sanitize/report
UNSANITIZED := --ignore=tests/test_t21_memory.py --ignore=tests/test_t24_interrupt.py \
  --ignore=tests/hf/test_t18_memory.py --ignore=tests/test_notebooks.py \
  --deselect=tests/hf/test_t18_masks.py::test_a_recycled_address_is_another_mask
sanitize: $(READY) ## the fast suite under AddressSanitizer and UndefinedBehaviorSanitizer
	@echo '== hisa._C with sanitizers'
	@HISA_SANITIZE=1 $(PY) -W ignore setup.py -q build --build-lib $(SANITIZED) 2>&1 | $(SHORT)
	@rm -f $(REPORT)*
	LD_PRELOAD='$(SANITIZERS)' PYTHONPATH=$(abspath $(SANITIZED)) PYTHONMALLOC=malloc \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:log_path=$(REPORT) \
	UBSAN_OPTIONS=print_stacktrace=1:log_path=$(REPORT) \
	$(PYTEST) -o pythonpath='$(SANITIZED) .' --import-mode=append -m 'not long and not gpu' \
	  $(UNSANITIZED) $(ARGS) || { cat $(REPORT)* 2>/dev/null; exit 1; }

# Each tool must report a bug made for it, and nothing in ours. `-m` takes the build of the folder it
# is called in.
CUDA_TOOLS := memcheck racecheck initcheck synccheck
CHECKED = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 --tool
PY_ANYWHERE = $(if $(VENV),$(abspath $(PY)),$(PY))
sanitize-cuda: $(READY) ## every CUDA kernel under the four tools of compute-sanitizer
	@echo '== hisa._C as racecheck needs it'
	@HISA_CUDA=1 NVCC_APPEND_FLAGS="$$NVCC_APPEND_FLAGS -DHISA_RACECHECK" $(PY) -W ignore setup.py -q \
	  build_py --build-lib build/racecheck/lib \
	  build_ext --build-lib build/racecheck/lib --build-temp build/racecheck/temp 2>&1 | $(SHORT)
	@nvcc -w -o build/seeded_bugs tests/seeded_bugs.cu
	@for tool in $(CUDA_TOOLS); do \
	  if [ $$tool = racecheck ]; then lib=build/racecheck/lib; else lib=.; fi; \
	  if $(CHECKED) $$tool build/seeded_bugs $$tool >build/sanitize.log; then \
	    cat build/sanitize.log; echo "$$tool does not report its seeded bug"; exit 1; fi; \
	  (cd $$lib && PYTHONPATH=$(CURDIR) $(CHECKED) $$tool $(PY_ANYWHERE) -m tests.sanitize_cuda) \
	    >build/sanitize.log 2>&1 \
	    || { cat build/sanitize.log; exit 1; }; \
	  echo "$$tool: $$(tail -n 2 build/sanitize.log | paste -sd ' ')"; \
	done

clean: ## remove everything that was built (.venv stays)
	rm -rf build dist *.egg-info hisa/_C*.so

# ---- setting up -----------------------------------------------------------------------------

$(STAMPS)/torch:
	@echo '== $(VENV): $(TORCH)'
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@$(PIP) 'setuptools>=77' wheel ninja numpy | $(NAMES)
	@mkdir -p $(STAMPS) && touch $@

$(BUILT): setup.py $(shell find csrc -type f) $(if $(VENV),$(STAMPS)/torch)
	@echo '== hisa._C'
	@rm -f $(dir $@)built-*
	@$(PY) setup.py build_ext --inplace 2>&1 | $(SHORT)
	@mkdir -p $(dir $@) && touch $@

# Once per pyproject.toml; reuses the objects of the step before.
$(STAMPS)/installed: pyproject.toml | $(BUILT)
	@echo '== hisa and its tools'
	@$(PIP) --no-build-isolation --config-settings editable_mode=compat -e '.[dev]' | $(NAMES)
	@touch $@
