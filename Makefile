# Every target runs in a virtual environment. An interpreter that has torch is layered under one, so that
# its own torch is used and nothing is installed into it; any other gets .venv with torch from pip.
#   make test PYTHON=/path/to/python        make demo TRAIN_FLAGS="--iterations 50"
PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
TRAIN_FLAGS ?=
PYTEST_FLAGS ?=
BENCH_FLAGS ?=

VENV := $(shell $(PYTHON) .ci/environment.py --where)
ifeq ($(VENV),)
$(error PYTHON=$(PYTHON) cannot be run; a Python of 3.10 or newer is needed)
endif
PY := $(VENV)/bin/python
STAMP := $(VENV)/.resnet_fused-installed
SOURCES := $(wildcard pyproject.toml setup.py) $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test test-full bench bench-quick gpu lint venv build clean
.DEFAULT_GOAL := test

$(STAMP): $(SOURCES) .ci/environment.py
	$(PYTHON) .ci/environment.py --venv $(VENV) --torch "$(TORCH)"
	@touch $@

venv: $(STAMP)

demo: venv
	$(PY) -m resnet_fused train --demo $(TRAIN_FLAGS)

test: venv
	$(PY) .ci/environment.py --interop
	$(PY) -m pytest tests -m "not full" -ra $$($(PY) .ci/environment.py --workers) $(PYTEST_FLAGS)

test-full: venv
	$(PY) .ci/environment.py --interop
	$(PY) -m pytest tests -ra $$($(PY) .ci/environment.py --workers) $(PYTEST_FLAGS)

bench: venv
	$(PY) .ci/environment.py --need pytest_benchmark
	$(PY) -m pytest benchmarks --benchmark-quiet --benchmark-json=benchmarks/results/latest.json $(BENCH_FLAGS)

bench-quick: venv
	$(PY) .ci/environment.py --need pytest_benchmark
	$(PY) -m pytest benchmarks --quick --benchmark-quiet --benchmark-json=benchmarks/results/latest-quick.json \
		$(BENCH_FLAGS)

gpu: venv
	$(PY) -m benchmarks.gpu

lint: venv
	$(PY) .ci/environment.py --need ruff mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy resnet_fused

build: venv
	$(PY) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f resnet_fused/*.so
	find resnet_fused tests -name __pycache__ -type d -prune -exec rm -rf {} +
