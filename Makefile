# make demo: install, export the demo checkpoint with its proof, translate with it. make test: lint, types, every test.
.PHONY: demo test proof lint setup clean

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
KVX := $(VENV)/bin/kvx
PARALLEL := -n auto --dist loadfile

demo: $(INSTALLED)
	$(KVX) export artifacts/numbers-checkpoint/model.pt --output artifacts/numbers --force
	$(KVX) translate --model artifacts/numbers "twelve thousand three hundred and four" "nine hundred and ninety-nine" "one"

test: lint
	$(VENV)/bin/pytest $(PARALLEL)

proof: $(INSTALLED)
	$(VENV)/bin/pytest -m proof

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvx needs Python 3.11 or newer: make PYTHON=…")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	mkdir -p $(VENV)/src
	ln -sfn ../.. $(VENV)/src/kvx
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
