# Two commands do all set-up on a fresh machine:  make demo   and   make test
PYTHON ?= python3
# Pinned, because an unpinned torch brings gigabytes of CUDA on some machines. Another build: make demo TORCH="torch ..."
TORCH  ?= torch==2.13.0
BIN    := .venv/bin
LEAN   := .venv-lean/bin
SOURCES := pyproject.toml $(shell find artifacts prep runtime -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)

.PHONY: demo test lint check lean docs clean

## Build the example model into demo.smoe and generate from it inside a budget smaller than its experts.
demo: .venv/installed
	test -d demo.smoe || $(BIN)/smoe-prep build examples/reference -o demo.smoe --calibration examples/calibration.jsonl --encoding f32
	$(BIN)/smoe run demo.smoe "def main(" --memory 60MiB --context 512 --max-new-tokens 96 --temperature 0.7 --seed 2

## Everything that CI runs: lint, import contracts, types, all tests, and the device side without torch.
test: lint check lean

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy -p smoe.artifacts -p smoe.runtime

check: .venv/tested
	$(BIN)/pytest -q

## The runtime's tests in an environment that `pip install smoe` makes: no torch, no transformers.
lean: .venv-lean/installed
	! $(LEAN)/python -c "import torch" 2>/dev/null
	$(LEAN)/pytest -q tests/artifacts tests/runtime

.venv/made:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/pip install -q "$(TORCH)"
	touch $@

.venv/installed: .venv/made $(SOURCES)
	$(BIN)/pip install -q '.[prep]'
	touch $@

.venv/tested: .venv/installed
	$(BIN)/pip install -q --group test --group lint
	touch $@

.venv-lean/installed: $(SOURCES)
	$(PYTHON) -m venv .venv-lean
	$(LEAN)/python -m pip install -q --upgrade pip
	$(LEAN)/pip install -q .
	$(LEAN)/pip install -q --group test
	touch $@

## docs/commands.md from what the commands print.
docs: .venv/installed
	$(BIN)/python docs/make_commands.py

clean:
	rm -rf .venv .venv-lean build demo.smoe demo.smoe.partial
