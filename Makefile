# Every target sets up .venv once and reuses it. `make` alone lists the targets.
PYTHON ?= python3
BIN = .venv/bin
# A machine with an NVIDIA driver takes PyPI's CUDA build of torch, any other this release.
TORCH = $(if $(shell command -v nvidia-smi 2>/dev/null),torch,torch==2.13.0)

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST)

finetune: .venv/demo-ready  ## the main job: fine-tune SmolLM2 in this form, as published, by LoRA, DoRA, in full
	$(BIN)/python examples/finetune.py $(ARGS)

test: .venv/ready  ## run the tests
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile \
		--no-loadscope-reorder $(ARGS)

peft-suite: .venv/ready  ## run PEFT's own tests on our method (10 minutes)
	$(BIN)/python tests/peft_suite/run.py $(ARGS)

bench: .venv/ready  ## time the layers and their rivals (3 minutes on a CPU)
	$(BIN)/python benchmarks/layer/run.py $(ARGS)

forgetting: .venv/ready  ## does it forget less? the 8-minute version
	$(BIN)/python benchmarks/forgetting/run.py --quick $(ARGS)

codegen: .venv/ready  ## compile every kernel for every chip, no GPU needed, and read the code
	$(BIN)/python -m secura_kernels.tools.inspect_triton $(ARGS)
	@if command -v nvcc >/dev/null; then $(BIN)/python -m secura_kernels.tools.inspect_cuda; \
	else echo 'no nvcc here: the CUDA kernels are left out'; fi

gpu:  ## on an NVIDIA GPU: kernels' tests, tuning, benchmarks, plots; installs nothing
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py $(ARGS)

lint: .venv/ready  ## check the style and the types of the public modules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready  ## write the code in ruff's format
	$(BIN)/ruff format .

docs: .venv/docs-ready  ## build the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

dist: .venv/ready  ## the source archive and the pure wheel, in dist/, checked as PyPI does
	$(BIN)/python -m pip install --quiet build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# torch first: another package would pull a build of its own choice.
.venv/demo-ready: pyproject.toml
	$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(None if sys.version_info >= (3, 11) else "Python >= 3.11 is needed, $(PYTHON) is " + v + ": make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

.venv/ready: .venv/demo-ready
	$(BIN)/python -m pip install --quiet --editable '.[peft,quant,demo,dev]'
	touch $@

.venv/docs-ready: .venv/ready
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

.PHONY: help finetune test peft-suite bench forgetting codegen gpu lint format docs dist
