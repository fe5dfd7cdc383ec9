# Two commands do everything: `make testbed` (the main job) and `make test`. Each sets itself up.
# `make test-edge` is the part of the tests that looks at devices as systems; `make test-chaos`
# breaks links, processes, clocks and disks (about 20 minutes, root).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.PHONY: venv testbed test test-edge test-chaos fuzz lint format clean

venv: $(STAMP)

$(STAMP): pyproject.toml tests/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable ".[dev]"
	touch $@

testbed: $(STAMP)
	$(BIN)/python -m tools.testbed $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

test-edge: $(STAMP) # a real systemd, an emulated ARM64 device; what a machine lacks is skipped
	$(BIN)/python -m pytest tests/system $(ARGS)

fuzz: $(STAMP) # 100,000 inputs each, guided by coverage; more with python -m tools.fuzz
	$(BIN)/python -m tools.fuzz decode --inputs 100000 --csv build/fuzz.csv $(ARGS)
	$(BIN)/python -m tools.fuzz handler --inputs 100000 --csv build/fuzz.csv $(ARGS)

test-chaos: $(STAMP) # faults over a bad link in network namespaces; see tests/chaos
	$(BIN)/python -m pytest tests/chaos $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs build dist
