# `make demo` and `make test` are all a newcomer needs; each sets itself up first.

PYTHON ?= python3
VENV ?= .venv
EXTRAS := adapters,plots,device-map,train,lm-eval,inspect,serve,dev
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= auto

.PHONY: demo test check format install browser clean

demo: $(READY)  ## measure both methods on the bundled model; tables and a picture in demo/
	$(BIN)/trueline demo --output demo

test: $(READY)  ## the whole suite, a worker a core (at most 8); the end says what was skipped
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

check: $(READY)  ## lint, format and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(READY)  ## the environment alone

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $(READY)

browser:  ## Chromium for the tests of the page, from Debian's packages; needs root
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -yqq chromium; }

clean:  ## remove the environment and what the demo wrote
	rm -rf $(VENV) demo
