# Two commands do everything: `make testbed` (the main job) and `make test`. Each sets itself up.
# `make help` lists them all, from the text behind ##.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
PROCESSES ?= 2
.DEFAULT_GOAL := help

.PHONY: help venv testbed test test-edge test-chaos docs bench fuzz lint format clean

help: ## this list; flags for a command go into ARGS, e.g. make testbed ARGS="--rounds 5"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; \
		do printf '%-16s %s\n' "$$name" "$$text"; done

venv: $(STAMP) ## what the other commands need, in .venv; they make it by themselves

$(STAMP): pyproject.toml tests/constraints.txt
	@echo "installing edge-sdk, torch and the tools for tests into $(VENV): once, some minutes,"
	@echo "1.7 GB with a torch for the CPU alone, more with the one for CUDA (see README.md)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable ".[dev]"
	@touch $@
	@echo "installed"

testbed: $(STAMP) ## the main job: a coordinator and emulated boards train on this machine
	$(BIN)/python -m tools.testbed $(ARGS)

test: lint ## every test but those of the chaos suite
	$(BIN)/python -m pytest -n $(PROCESSES) --capture sys $(ARGS)

test-edge: $(STAMP) ## devices as systems: systemd, emulated ARM64; what is lacking is skipped
	$(BIN)/python -m pytest tests/system $(ARGS)

fuzz: $(STAMP) ## 200,000 hostile inputs for the wire, guided by coverage
	$(BIN)/python -m tools.fuzz decode --inputs 100000 --csv build/fuzz.csv $(ARGS)
	$(BIN)/python -m tools.fuzz handler --inputs 100000 --csv build/fuzz.csv $(ARGS)

test-chaos: $(STAMP) ## broken links, processes, clocks and disks: 20 minutes, as root
	$(BIN)/python -m pytest tests/chaos $(ARGS)

docs: $(STAMP) ## every command, flag, link, table and example of the documents, tried
	$(BIN)/python -m pytest tests/test_documents.py tests/test_extending.py tests/test_examples.py $(ARGS)

bench: $(STAMP) ## short forms of the benchmarks of wire, load and memory; the whole: docs/results
	$(BIN)/python -m tools.bench.wire --megabytes 10 --clients 4 --csv build/bench/wire.csv
	$(BIN)/python -m tools.bench.load --clients 10 --rounds 3 --csv build/bench/load.csv
	$(BIN)/python -m tools.bench.memory --models cnn --batches 8 --runs 1 --csv build/bench/memory.csv

lint: $(STAMP) ## format, rules and types, checked
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove .venv, runs and what was built
	rm -rf $(VENV) runs build dist
