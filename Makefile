# Everything runs in .venv, which is made on first use.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)  # DeepSpeed builds with the ninja that lies there
READY := .venv/ready

.PHONY: demo test lint operators table bench clean

demo: $(READY)  ## train on 2 processes, then resume for more epochs
	rm -rf runs/demo
	$(BIN)/fabric run --accelerator cpu --devices 2 examples/digits.py --epochs 10 --out runs/demo
	$(BIN)/fabric run --accelerator cpu --devices 2 examples/digits.py --epochs 15 --out runs/demo --resume | tee runs/demo/last.txt
	grep -qx "world size 2" runs/demo/last.txt
	grep -Eqx "test accuracy (0\.9[789]|1\.0).*" runs/demo/last.txt

# Two workers: most tests start processes and wait for them. Compiled modules are kept, which each of those reads.
test: $(READY)  ## lint, types and all tests
	$(MAKE) --jobs=2 --output-sync=target lint operators
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

operators: $(READY)  ## what DeepSpeed compiles the first time: on nobody's time limit, and once for both workers
	$(BIN)/python -c "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"

table: $(READY)  ## one training run under every strategy, compared with one process
	OMP_NUM_THREADS=1 $(BIN)/python examples/every_strategy.py

bench: $(READY)  ## the figures of the README, on this machine
	for name in import_cost step launch checkpoint fsdp meta_init compile; do $(BIN)/python benchmarks/$$name.py; done

clean:
	rm -rf .venv runs build dist src/*.egg-info

# torch first and alone: it is the large one, and the others then keep its version.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@
