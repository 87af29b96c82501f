# Every target that needs Python sets its environment up first: .ci/setup.sh does that, then runs Python with its arguments.
PYTHON := .ci/setup.sh

.PHONY: help setup demo test check cuda sanitize soak gpu clean
.PHONY: bench bench-ops bench-decode bench-disk bench-snapshot bench-turns bench-tenants bench-systems

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 8

setup: ## make the Python environment (.venv, or see .ci/setup.sh), nothing else
	@$(PYTHON)

demo: ## serve a model, send it pictures in changing prompts, report what was reused
	@$(PYTHON) examples/demo.py

test: ## run all tests
	@$(PYTHON) -m pytest -q

check: ## look at format, lint, types and the direction of imports; then cuda and sanitize
	@$(PYTHON) -m ruff format --check
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m mypy
	@$(PYTHON) -m pytest -q tests/test_arrows.py
	@$(PYTHON) .ci/compile_cuda.py
	@$(PYTHON) .ci/sanitize.py

cuda: ## compile the CUDA library for all architectures (no GPU needed), look for spilled registers
	@$(PYTHON) .ci/compile_cuda.py

sanitize: ## run the tests of the operations under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(PYTHON) .ci/sanitize.py

bench: ## measure time to first token with and without reuse
	@$(PYTHON) tests/bench/bench_ttft.py

bench-systems: ## measure the connector beside its alternatives, and against its targets (28 minutes)
	@$(PYTHON) tests/bench/bench_systems.py

bench-ops: ## measure the operations on the CPU, beside memcpy and the engine's attention
	@$(PYTHON) tests/bench/bench_ops.py

bench-decode: ## measure how evenly requests decode while long prompts are reused
	@$(PYTHON) tests/bench/bench_decode.py

bench-turns: ## measure later turns of conversations that used reuse, beside plain prefix caching
	@$(PYTHON) tests/bench/bench_turns.py

bench-tenants: ## try to learn by timing what another tenant has shown
	@$(PYTHON) tests/bench/bench_tenants.py

bench-disk: ## measure the disk tier beside plain reads and writes, its start-up and its look-ups
	@$(PYTHON) tests/bench/bench_disk.py

bench-snapshot: ## measure what a snapshot of the host tier does to look-ups and inserts, beside fork() (20 GiB of memory)
	@$(PYTHON) tests/bench/bench_snapshot.py

soak: ## send 10000 mixed requests to a server with planted faults, and check every answer (10 minutes on two idle cores)
	@$(PYTHON) tests/soak/soak.py --requests 10000

gpu: ## test and measure the operations on this machine's GPU, with its python3 as it is
	@.ci/gpu.sh

clean: ## delete what was built, measured and cached (not .venv)
	rm -rf build dist out .checkpoints .mypy_cache .pytest_cache .ruff_cache src/*.egg-info
	find src tests examples -name __pycache__ -prune -exec rm -rf {} + -o -name '*.so' -exec rm -f {} +
