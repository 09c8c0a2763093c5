# On a fresh machine: `make demo` runs the main job, `make test` passes the tests. Each target sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint bench docs dist ffcv clean

demo: $(VENV)/.demo
	$(BIN)/repcon demo

test: $(VENV)/.test
	@if tools/install-ffcv --possible; then tools/install-ffcv $(BIN)/python; fi
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

# make bench ARGS="--long --record --data FOLDER"
bench: $(VENV)/.test
	@if tools/install-ffcv --possible; then tools/install-ffcv $(BIN)/python; fi
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "built build/docs; to read it: $(BIN)/python -m http.server -d build/docs"

# A wheel and an sdist in dist/, and the wheel started in an empty environment.
dist: $(VENV)/.dist
	rm -rf dist
	$(BIN)/python -m build
	tools/check-wheel $(PYTHON) dist/*.whl

ffcv: $(VENV)/.demo
	tools/install-ffcv $(BIN)/python

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "repcon needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# torch first and by its pin: a range would let pip take the registry's newest build, with gigabytes of another CUDA.
$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a few minutes the first time)"
	$(PIP) torch torchvision
	$(PIP) --editable '.[dali,demo]'
	tools/complete-torchvision $(BIN)/python
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable '.[dali,demo,ray,s3,hf,tensorboard,wandb,mlflow,hub,export,bench,test,lint,docs]'
	@touch $@

# Builds the pages only, so torch is not needed.
$(VENV)/.docs: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) mkdocs-material
	@touch $@

$(VENV)/.dist: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) build
	@touch $@

clean:
	rm -rf $(VENV) build dist demo-run bench-run
