# make demo     train a model, sample from it, evaluate it, make its report
# make test     laws, reference numbers and commands: at most five minutes on two cores
# make check    everything: also lint, types and the slow tests
# make lint     style, format and types
# make docs     the documentation as HTML
# make mutants  make one mistake at a time, and check that a test fails
# make matrix   the wheel in fresh environments: each Python of PATH, lowest and newest dependencies
# make bench    times beside other packages
# make clean    remove .venv and the HTML
# All but clean create .venv if it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test check lint docs mutants matrix bench clean

help:
	@sed -n 's/^# make/make/p' Makefile

demo: .venv/installed
	$(BIN)/diffuse train name=demo model.class_conditional=true
	$(BIN)/diffuse sample run=demo label=all num_samples=100
	$(BIN)/diffuse eval run=demo metric=fid features=classifier num_samples=2000
	$(BIN)/diffuse report run=demo
	@echo
	@echo "The samples:          $$(ls -td outputs/demo/samples/*/ | head -1)grid.png"
	@echo "How they took shape:  outputs/demo/previews/"

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# Some slow tests wait for batch jobs and killed processes: three workers fill two cores. Their order is that of
# tests/conftest.py.
check: lint test
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m slow

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: .venv/installed
	$(BIN)/python -m sphinx -q -E -W --keep-going -n docs docs/_build/html
	@echo "The site: docs/_build/html/index.html"

mutants: .venv/installed
	$(BIN)/python scripts/mutate.py --table docs/results/mutants.md

matrix: .venv/installed
	$(BIN)/python scripts/matrix.py

bench: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	mkdir -p outputs
	$(BIN)/python scripts/benchmark.py train_step sample data startup fid memory \
		--json outputs/benchmark.json --plot outputs/roofline.png

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; give one as PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv docs/_build
