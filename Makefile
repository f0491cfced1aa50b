PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2

.PHONY: demo test test-all test-lowest lint benchmark overhead families clean

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev,benchmark,qlora,trainers]'
	touch $@

demo: $(VENV)/.installed  ## compress a real model on real data; ARGS="--model ... --dataset ..." takes any from the Hub
	$(VENV)/bin/python scripts/demo.py $(ARGS)

test: $(VENV)/.installed  ## the default suite
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-all: $(VENV)/.installed  ## with the slow ones
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "slow or not slow" $(ARGS)

# what asks transformers itself: models of every family, loading and saving, generation, the Trainer
LOWEST = families surgery loader callback trainer composites conversions unreached channels exits quantized_models distillation

test-lowest:  ## what asks transformers, on the lowest one that is supported, in an environment of its own
	$(PYTHON) -m venv $(VENV)-lowest
	sed -e 's/^transformers==.*/transformers==5.20.0/' -e '/^huggingface_hub==/d' -e '/^tokenizers==/d' constraints.txt > $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/python -m pip install -c $(VENV)-lowest/constraints.txt -e '.[dev]'
	HF_HUB_OFFLINE=1 $(VENV)-lowest/bin/python -m pytest -n $(WORKERS) --dist worksteal $(LOWEST:%=tests/test_%.py) $(ARGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

benchmark: $(VENV)/.installed  ## MiniLM on SST-2: half of the heads and neurons, one epoch of distillation, int8
	HF_HUB_OFFLINE=1 $(VENV)/bin/python scripts/benchmark_text.py $(ARGS)

benchmark-%: $(VENV)/.installed  ## distillation, quantization, kernels, exits (these after `make benchmark`), depthwise, llama, peers, scaling, ...
	HF_HUB_OFFLINE=1 $(VENV)/bin/python scripts/benchmark_$*.py $(ARGS)

overhead: $(VENV)/.installed  ## what masks, planning and loading cost
	HF_HUB_OFFLINE=1 $(VENV)/bin/python scripts/benchmark_overhead.py $(ARGS)

families: $(VENV)/.installed  ## every model type x every edit: docs/families.md
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m tests.sweep $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-lowest build dist *.egg-info runs
