# Two commands, each from a fresh clone with nothing but Python: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# What the commands need is installed again when a dependency changes: the package alone for the demo, and what the tests
# and checks need besides.
PACKAGE := $(VENV)/.package
STAMP   := $(VENV)/.ready

.PHONY: demo test quick lint types clean

demo: $(PACKAGE)
	rm -rf out/demo
	$(BIN)/tav demo --out=out/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

quick: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright

# Without bytecode, which takes a third of the time and 200 MB: Python writes that of the modules that are imported.
$(PACKAGE): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable .
	touch $@

$(STAMP): $(PACKAGE) tests/install_oracle.py
	$(BIN)/python tests/install_oracle.py
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache
