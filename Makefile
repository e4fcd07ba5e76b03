# make demo: install, export the demo checkpoint with its proof, translate with it.
# make test: lint, types and every test but the long ones, which make proof runs.
# make test-runtime PYTHON=python3.13: the tests of the runtime on another Python, without torch.
.PHONY: demo test test-runtime bundles proof lint setup clean

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
KVX := $(VENV)/bin/kvx
PARALLEL := -n auto
TEST_BUNDLES := build/test-bundles

demo: $(INSTALLED)
	$(KVX) export artifacts/numbers-checkpoint/model.pt --output artifacts/numbers --force
	$(KVX) translate --model artifacts/numbers "twelve thousand three hundred and four" "nine hundred and ninety-nine" "one"

test: lint $(TEST_BUNDLES)/.exported
	KVX_TEST_BUNDLES=$(TEST_BUNDLES) $(VENV)/bin/pytest $(PARALLEL) --dist loadfile

# The second environment has no torch. It tests bundles that the first one exported.
test-runtime: $(TEST_BUNDLES)/.exported
	scripts/test_runtime.sh "$(PYTHON)" $(TEST_BUNDLES)

proof: $(TEST_BUNDLES)/.exported
	KVX_TEST_BUNDLES=$(TEST_BUNDLES) $(VENV)/bin/pytest -m proof $(PARALLEL) --dist loadfile

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bundles: $(TEST_BUNDLES)/.exported

# Exported once for all tests, and again where anything that an export depends on is newer.
$(TEST_BUNDLES)/.exported: $(INSTALLED) tests/conftest.py $(shell find models exporter runtime -name '*.py')
	rm -rf $(TEST_BUNDLES)
	KVX_TEST_BUNDLES=$(TEST_BUNDLES) $(VENV)/bin/pytest $(PARALLEL) --dist loadgroup tests/test_shared_bundles.py
	touch $@

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt $(wildcard runtime/kernels/*.c runtime/kernels/*.h runtime/kernels/*.inc)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvx needs Python 3.11 or newer: make PYTHON=…")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	mkdir -p $(VENV)/src
	ln -sfn ../.. $(VENV)/src/kvx
	touch $@

clean:
	rm -rf runtime/kernels/*.so $(VENV) $(VENV)-3.* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
