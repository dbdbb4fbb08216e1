# Everything sets itself up: `make demo` and `make test` need a Rust toolchain, CPython >= 3.11 with
# pip, and nothing else. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Through the environment, so that quotes in it are text.
export PROMPT ?= It was a fine morning, and Elizabeth
export INSTA_UPDATE ?= no

.PHONY: help demo test test-rust test-python test-units test-clusters test-sim test-rdma loom miri fuzz lint format build proto clean

help:            ## list the targets
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  +##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | column -ts '	'

demo: build      ## 2 attention + 2 FFN processes continue PROMPT="..." in the terminal
	@$(BIN)/step3rt generate --model nano --attention 2 --ffn 2 --fabric shm --stats \
		--max-tokens 120 -- "$$PROMPT"

test: test-rust test-python test-sim  ## all tests that need no GPU and no RDMA device

test-rust:       ## unit, property and integration tests of the Rust crates
	cargo test --workspace --quiet

# Either half leaves a core idle half of the time.
test-python: build  ## unit, kernel-compile and end-to-end tests, two at a time
	@echo "Two halves at a time, about 10 minutes on two cores; each prints when it has ended."
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-units test-clusters

test-units:
	$(BIN)/python -m pytest --ignore=tests/e2e

test-clusters:
	$(BIN)/python -m pytest tests/e2e

test-sim: build  ## 20,000 seeds of the scheduler's simulator
	$(BIN)/step3rt sim --seeds 20000

test-rdma: build  ## the fabric and nano over real verbs, in a virtual machine with a software RDMA device
	tests/rdma/run_in_vm.sh

loom:            ## models of what is shared without locks, in every interleaving of a few threads
	RUSTFLAGS="--cfg loom -D warnings" RUST_BACKTRACE=0 \
		cargo test --package step3rt-fabric --lib --target-dir target/loom --quiet models::

miri:            ## the fabric's memory, slots and doorbell under Miri; installs a nightly compiler with it
	tests/miri/run.sh

fuzz:            ## fuzz every parser of bytes from a peer for a minute each (docs/testing.md)
	fuzz/run 60

lint: build      ## formatting, lints, types, import rules
	cargo fmt --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest step3rt._core
	$(BIN)/lint-imports
	find kernels -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format:          ## rewrite sources in the project's style
	cargo fmt
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
	find kernels -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

build: $(VENV)/.installed  ## virtual environment, Python dependencies, extension module
	@log=$$($(BIN)/maturin develop --quiet --skip-install 2>&1) || { echo "$$log"; exit 1; }

proto: $(VENV)/.installed  ## regenerate the Python messages from proto/
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=python --pyi_out=python \
		--grpc_python_out=python proto/step3rt/v1/common.proto proto/step3rt/v1/inference_service.proto
	rm python/step3rt/v1/common_pb2_grpc.py

clean:           ## remove everything that is built
	rm -rf $(VENV) target fuzz/target dist python/step3rt/_core*.so

$(VENV)/.installed: pyproject.toml
	@echo "Setting up $(VENV): tools, then torch (about 3 GB with what it brings), then the Rust extension."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@echo "  tools";  $(BIN)/python -m pip install --quiet --group dev
	@echo "  Python dependencies and the extension; the first build takes minutes"
	@log=$$($(BIN)/maturin develop --quiet --extras worker 2>&1) || { echo "$$log"; exit 1; }
	@touch $@
