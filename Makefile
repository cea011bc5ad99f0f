# make lab      what is missing is installed and fetched, then JupyterLab opens on the first lesson
#               (on a server: make lab LAB_ARGS=--no-browser)
# make test     lint, unit tests, then every lesson is run and compared with what it says
# make lessons  only the lessons (one of them: make lessons LESSONS=lessons/01_numbers.ipynb)
# make bundle   in bundle/, all that a GPU machine without a network needs to run the lessons
# make format   ruff puts code and lessons in shape
# Another Python: make PY=python3.12 lab

PY ?= python3
LESSONS ?= $(wildcard lessons/[0-9]*.ipynb)
# two lessons at a time share the cores: 1.5 times faster than one that has them all
JOBS ?= 2
THREADS ?= $(shell $(PY) -c 'import os; print(max(1, (os.cpu_count() or 1) // $(JOBS)))')
BIN := .venv/bin
READY := .venv/.ready
FETCHED := .venv/.fetched
EXTRAS := .[lab,test]
NO_NEWS := {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}

.PHONY: lab test lessons bundle lint format
.DELETE_ON_ERROR:

lab: $(FETCHED)
	$(BIN)/jupyter lab --ServerApp.root_dir='$(CURDIR)' $(if $(filter 0,$(shell id -u)),--allow-root) \
	    lessons/00_start_here.ipynb $(LAB_ARGS)

test: lint $(FETCHED)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/pytest -n $(JOBS) -m 'not lessons and not alone' tests
	$(BIN)/pytest -m 'alone and not lessons' tests
	$(MAKE) lessons

lessons: export OMP_NUM_THREADS = $(THREADS)
lessons: $(FETCHED)
	$(if $(LESSONS),$(BIN)/pytest --nbval --nbval-current-env --nbval-cell-timeout 300 \
	    -n $(JOBS) --dist loadfile $(LESSONS))
	$(if $(LESSONS),$(BIN)/pytest -m lessons -n $(JOBS) tests/test_lessons.py)

bundle: $(FETCHED)
	$(BIN)/python data/make_bundle.py

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# pip tries for seconds, not for minutes; where the index is silent, one sentence stands for its many lines
define pip
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --retries 2 --timeout 15 \
	    -c constraints.txt $(1) 2>.venv/pip.log || { grep -q Retrying .venv/pip.log || cat .venv/pip.log; \
	    echo "Missing: packages of constraints.txt, which pip could not get (see .venv/pip.log); if the package" \
	    "index cannot be reached, go online, or set PIP_INDEX_URL to an index that can be, or PIP_NO_INDEX=1 and" \
	    "PIP_FIND_LINKS to a folder with their wheels, and run make again."; exit 1; } >&2
endef

$(READY): pyproject.toml constraints.txt
	@$(PY) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else \
	    "Python 3.11, 3.12 or 3.13 is needed and $(PY) is %d.%d: name another with make PY=..." % v)'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PY) -m venv .venv
	@echo "Installing into .venv what constraints.txt pins: 2 GB, more where torch brings CUDA, in a few minutes"
	$(call pip,-q setuptools)
	$(call pip,torch)
	$(call pip,-q --no-build-isolation -e '$(EXTRAS)')
	@mkdir -p .venv/share/jupyter/lab/settings
	@echo '$(NO_NEWS)' >.venv/share/jupyter/lab/settings/overrides.json
	@touch $@

$(FETCHED): $(READY) data/sources.toml
	$(BIN)/python data/prepare.py
	@touch $@
