# Each target sets up .venv by itself: `make demo` or `make test` is the only command a bare machine needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
BENCHMARKS := $(wildcard $(addprefix benchmarks/,memory.py cost.py quality.py))

define NEWLINE


endef

# torch-npu without CANN breaks `import torch` unless it is kept from loading by itself; the command sets this too.
export TORCH_DEVICE_BACKEND_AUTOLOAD ?= 0

.DEFAULT_GOAL := help
.PHONY: demo test test-browser lint bench clean help check-python
.NOTPARALLEL: # two pip runs in one environment break each other

help: ## list the targets
	@echo "Lightpress: make TARGET [PYTHON=python3.11]"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'

demo: $(VENV)/.ready-demo ## compress the shipped demo checkpoint and print dense against compressed
	$(BIN)/lightpress demo

test: $(VENV)/.ready-test ## run the tests
	$(BIN)/pytest tests

test-browser: $(VENV)/.ready-browser ## test the report in headless Chromium
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
	  || { echo "There is no Chromium here: install your system's (Debian: apt-get install chromium), then try again." >&2; exit 1; }
	$(BIN)/pytest tests/test_page.py

lint: $(VENV)/.ready-lint ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.ready-test ## measure memory, cost and quality on this machine
	$(if $(BENCHMARKS),,@echo "No benchmark scripts in benchmarks/ yet.")
	$(foreach script,$(BENCHMARKS),$(BIN)/python $(script)$(NEWLINE))

clean: ## remove the environment, builds, caches and the demo's output
	rm -rf $(VENV) build dist *.egg-info demo-out .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find compress backends profiles cli tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Set-up. A .ready-* file is removed first and touched last, so it only ever stands for a finished installation.

check-python:
	@command -v $(PYTHON) >/dev/null \
	  || { echo "Lightpress needs Python 3.11 or newer, and there is no '$(PYTHON)' here: install it, or name yours with 'make PYTHON=/path/to/python3.11'." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Lightpress needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1): name a newer one, for example 'make PYTHON=python3.11'." >&2; exit 1; }

# torch goes first and alone: given only its exact version, pip may take a CPU build from a local wheel folder.
$(VENV)/.ready-torch: constraints.txt | check-python
	@rm -f $(VENV)/.ready-*
	@echo "==> set-up 1/2: $(VENV) with $(TORCH) (some minutes and up to several GB the first time)"
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install $(TORCH)
	@touch $@

$(VENV)/.ready-demo: EXTRAS :=
$(VENV)/.ready-test: EXTRAS := [test]
$(VENV)/.ready-lint: EXTRAS := [dev]
$(VENV)/.ready-browser: EXTRAS := [browser]
$(VENV)/.ready-demo $(VENV)/.ready-test $(VENV)/.ready-browser $(VENV)/.ready-lint: $(VENV)/.ready-torch pyproject.toml constraints.txt
	@rm -f $@
	@echo "==> set-up 2/2: lightpress$(EXTRAS) and what it needs"
	$(PIP) install -c constraints.txt -e ".$(EXTRAS)"
	@touch $@
	@echo "==> set-up done"
