# Every target makes what it needs; `make install` alone sets up .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test lint types kernels check-kernels bench bench-kernels docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[eval,dev]'
	touch $(STAMP)

demo: install
	$(BIN)/ensembler inspect demo --prompt "$$(sed -n 1p ensembler/demo/family/data/examples.jsonl | $(BIN)/python -c 'import json, sys; print(json.loads(sys.stdin.readline())["prompt"])')"
	$(BIN)/ensembler generate demo --prompts ensembler/demo/family/data/examples.jsonl --max-new-tokens 24 --explain

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

kernels:  # needs nvcc and no GPU
	$(PYTHON) kernels/ensembler_kernels/cuda/build.py

check-kernels: install  # needs nvcc, cuobjdump and Triton, and no GPU
	$(BIN)/python kernels/compile_check.py

bench: install
	$(BIN)/python benchmarks/decode_cost.py

bench-kernels: install
	$(BIN)/python kernels/benchmarks/bench_cpu.py

docs: install
	$(BIN)/python docs/make_cli_reference.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
