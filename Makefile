# Tidegate. `make up` and `make down` are all that a user needs; `make help` lists the rest.
# TIDEGATE_PYTHON names the Python to use (3.11 or 3.12); every TIDEGATE_* setting is passed on.

SHELL := /bin/sh
.DEFAULT_GOAL := help
# Every target of this file: none of them is a file.
.PHONY: $(shell sed -n 's/^\([a-z][a-z-]*\):.*/\1/p' $(firstword $(MAKEFILE_LIST)))

PY := .venv/bin/python
STATE := $(or $(TIDEGATE_STATE_DIR),.tidegate)
RUNTIME := $(or $(TIDEGATE_RUNTIME_DIR),$(STATE)/runtime)
# Each test process has servers of its own, or a whole stack, which the tests of a file share. They wait as well
# as compute, so there may be more of them than cores. They take file after file, the short ones last: so a file's
# servers start once, and its tests stay in their order.
PART_TESTS ?= tests/integration tests/unit
STACK_TESTS ?= tests/chaos tests/e2e
PYTEST_FLAGS ?= -q

# TIDEGATE_PYTHON, else the Python of an existing environment, else the first that is complete and was compiled with
# optimizations, else the first that can be used; else python3, which then says what to do.
FIND_PYTHON = usable=; \
	for p in $(PY) python3 python3.12 python3.11 /usr/bin/python3 /usr/bin/python3.12 /usr/bin/python3.11; do \
	  command -v "$$p" >/dev/null 2>&1 || continue; \
	  [ -z "$$TIDEGATE_PYTHON" ] || break; \
	  "$$p" -m deploy.bootstrap.python_check 2>/dev/null; s=$$?; \
	  case "$$s-$$p" in 0-*|10-$(PY)) usable="$$p"; break;; 10-*) usable="$${usable:-$$p}";; esac; \
	done; \
	p="$${TIDEGATE_PYTHON:-$${usable:-python3}}"; \
	command -v "$$p" >/dev/null 2>&1 || { echo "There is no $$p here: install Python 3.11 or 3.12."; exit 2; }

# Where Python writes no bytecode (PYTHONDONTWRITEBYTECODE), every process would compile our modules anew.
# In a folder that may not be written it stays so.
COMPILE = $(PY) -m compileall -qq tidegate services || true

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /|/' | awk -F'|' '{printf "  make %-16s %s\n", $$1, $$2}'

bootstrap:
	@$(FIND_PYTHON); "$$p" -m deploy.bootstrap
	@$(COMPILE)

bootstrap-dev:
	@$(FIND_PYTHON); "$$p" -m deploy.bootstrap --dev
	@$(COMPILE)

up: bootstrap ## install what is missing, start everything, serve the example
	@exec .venv/bin/tidegate up --example

down: ## stop everything that `make up` started
	@if [ -x .venv/bin/tidegate ]; then exec .venv/bin/tidegate down; else echo "Nothing is installed, so nothing runs."; fi

# The index may be named by PIP_INDEX_URL: the default one has torch for NVIDIA GPUs, which is large.
TORCH ?= torch
torch: bootstrap ## let the models' environment serve TorchScript (TORCH=torch==2.8 names a version)
	$(PY) -m pip --python "$(RUNTIME)/model-env/bin/python3" install '$(TORCH)' 'numpy<2'

# onnxruntime and onnxruntime-gpu are the same Python package, so one replaces the other.
ONNX_GPU ?= onnxruntime-gpu[cuda,cudnn]
onnx-gpu: bootstrap ## let the models' environment run ONNX models on NVIDIA GPUs (with CUDA's libraries a download of 1.6 GB)
	$(PY) -m pip --python "$(RUNTIME)/model-env/bin/python3" uninstall --yes onnxruntime
	$(PY) -m pip --python "$(RUNTIME)/model-env/bin/python3" install '$(ONNX_GPU)' 'numpy<2'

clean: down ## stop everything and forget the data (what was installed stays)
	@rm -rf "$(STATE)/data" "$(STATE)/run" "$(STATE)/log" "$(STATE)/cache" "$(STATE)/replicas" \
	  "$(STATE)/examples" "$(STATE)/token" "$(STATE)/metrics" "$(STATE)/secrets" "$(STATE)/reproduce" "$(STATE)/gpus.lock"
	@echo "The data in $(STATE) is gone; what was installed stays."

# Each process of the tests would rewrite their asserts anew; so they are collected once first, into bytecode, on the
# core that the type checker leaves idle. What fails there, fails below, and says so.
test: export PYTHONDONTWRITEBYTECODE =
test: bootstrap-dev ## install what is missing, check the code, run every test
	@$(MAKE) --no-print-directory --jobs=2 check test-bytecode
	$(PY) -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS) $(PART_TESTS)
	$(PY) -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS) $(STACK_TESTS)

# A red run names the tests that failed. About eight minutes each on two idle cores.
REPEAT_FLAGS ?= --runs 3
test-repeat: bootstrap-dev ## run the tests in fresh clones; REPEAT_FLAGS="--runs 10 --busy 2 --cores 1" makes them many and hard
	$(PY) -m tests.repeat $(REPEAT_FLAGS)

# Not a part of `make test`: torch is a download of 200 MB (its build for the CPU) to several GB (the default one).
test-torch: bootstrap-dev ## test TorchScript models; installs torch into the models' environment first, if it is not there
	@"$(RUNTIME)/model-env/bin/python3" -c 'import torch' 2>/dev/null || { \
	  echo "Installing $(TORCH) into the models' environment: 200 MB to several GB, once. TORCH and PIP_INDEX_URL choose the build."; \
	  $(MAKE) --no-print-directory torch; }
	$(PY) -m pytest $(PYTEST_FLAGS) -m torch tests/integration/worker

# Needs an NVIDIA GPU with its driver, and `make torch onnx-gpu`; what is missing is said, and skipped.
test-gpu: bootstrap-dev ## test models on this machine's GPU (digits by ONNX, TorchScript, what status says)
	$(PY) -m pytest $(PYTEST_FLAGS) -m gpu tests/e2e

# The earlier revision is checked out from git; without the history the tests are skipped, and say so.
FROM ?= 026450f
test-upgrade: bootstrap-dev ## start this revision on the state of an earlier one (FROM=026450f)
	TIDEGATE_UPGRADE_FROM=$(FROM) $(PY) -m pytest $(PYTEST_FLAGS) -rs tests/upgrade

test-bytecode:
	@$(PY) -m pytest --collect-only -qq $(PART_TESTS) $(STACK_TESTS) >/dev/null 2>&1 || true

# How many times more examples than `make test` tries; at 100 it takes about half an hour.
FUZZ_EXAMPLES ?= 100
fuzz: bootstrap-dev ## the tests of parsers with made-up input, with FUZZ_EXAMPLES (100) times as many examples
	TIDEGATE_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(PY) -m pytest -n 4 --timeout 7200 -m "fuzz or hypothesis" $(PYTEST_FLAGS) tests/unit tests/integration

journeys: bootstrap-dev ## every page of docs/guides, typed as a reader does: from a wheel, in a folder of its own
	$(PY) -m pytest -s $(PYTEST_FLAGS) tests/journeys

test-clients: bootstrap-dev ## the clients that need an environment of their own, against a stack
	$(PY) -m benchmarks.install --only kserve
	$(PY) -m pytest $(PYTEST_FLAGS) tests/e2e/test_grpc.py -k kserve

check: ## lint, format, types, import rules, sizes
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m mypy --python-version 3.10 --no-warn-return-any tidegate/cli tidegate/client
	$(PY) .venv/bin/lint-imports --no-logo
	$(PY) -m deploy.size_report
	$(PY) -m deploy.settings_doc --check

# With the Python of the environment, or any other that has pip: it needs nothing of Tidegate's.
wheel: bootstrap ## build dist/tidegate-*.whl, which `pip install` takes: the Python client and the command line
	@rm -rf build dist/tidegate-*.whl
	@$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@rm -rf build *.egg-info
	@echo "pip install $$(ls dist/tidegate-*.whl)"

fmt: ## format the code and fix what can be fixed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: ## write the pages that are made from code
	$(PY) -m deploy.settings_doc

# A peer that cannot be installed is reported in the table and does not stop the others.
bench: bootstrap ## measure Tidegate beside its peers (about 45 minutes)
	-$(PY) -m benchmarks.install
	$(PY) -m benchmarks.run $(BENCH_FLAGS)

security: bootstrap-dev ## the defects of the security review, each with its test, as a table (SECURITY_FLAGS=--measure)
	$(PY) -m benchmarks.defects security $(SECURITY_FLAGS)

first-contact: bootstrap-dev ## what new users met, each with its test, as a table (FIRST_CONTACT_FLAGS=--measure)
	$(PY) -m benchmarks.defects first-contact $(FIRST_CONTACT_FLAGS)

# What draws charts and flame graphs.
bench-plot: bootstrap
	@$(PY) -m benchmarks.install --only plot

# The promise of every change: the hot path within 3 % of what it was. REV names the other revision.
REV ?= HEAD~1
bench-against: bootstrap ## the hot path beside another revision (REV=HEAD~1), alternating in one run
	$(PY) -m benchmarks.against $(REV) $(BENCH_FLAGS)

bench-broker-tax: bootstrap ## what the queue costs, by hop and by process
	$(PY) -m benchmarks.broker_tax $(BENCH_FLAGS)

bench-overload: bench-plot ## offered load from 0.5 to 3 times the capacity: goodput, waits, refusals
	$(PY) -m benchmarks.overload $(BENCH_FLAGS)

bench-soak: bench-plot ## memory of every process over 20 minutes at 70 % load, with a picture
	$(PY) -m benchmarks.soak $(BENCH_FLAGS)

bench-heavy: bootstrap ## envelopes with heavy models, and a light and a heavy one side by side
	$(PY) -m benchmarks.heavy $(BENCH_FLAGS)

bench-mixups: bootstrap ## 100,000 requests of mixed sizes, each answer checked against its input
	$(PY) -m benchmarks.mixups $(BENCH_FLAGS)

bench-perf-analyzer: up ## NVIDIA's perf_analyzer, as it is, over HTTP and gRPC (needs Debian's libb64-0d)
	benchmarks/perf_analyzer.sh digits --shape image:1,64 --concurrency-range 1:17:16 $(BENCH_FLAGS)

bench-rate-limit: bootstrap ## one key's limit over four gateway processes; what access costs a request
	$(PY) -m benchmarks.rate_limit $(BENCH_FLAGS)

request-path: bootstrap ## print the files that a small request runs through, in order
	@$(PY) -m benchmarks.request_path

bench-flame: bench-plot ## flame graphs of gateway and worker under load
	$(PY) -m benchmarks.flame $(BENCH_FLAGS)

bench-fleet: bootstrap ## one round of the autoscaler over up to 2,000 Deployments, simulated
	$(PY) -m benchmarks.fleet $(BENCH_FLAGS)

bench-spike: bootstrap ## ten times the load for two minutes: wait, replicas, the curve; beside KEDA and Knative
	$(PY) -m benchmarks.spike $(BENCH_FLAGS)

bench-healing: bootstrap ## kill -9 of twenty workers in turn under load
	$(PY) -m benchmarks.healing $(BENCH_FLAGS)

bench-cold-start: bootstrap ## the first request to a sleeping model, without and with a warm pool
	$(PY) -m benchmarks.cold_start $(BENCH_FLAGS)

bench-jobs: bootstrap ## jobs accepted and done per second, beside FastAPI + Celery
	$(PY) -m benchmarks.install --only celery
	$(PY) -m benchmarks.jobs $(BENCH_FLAGS)

bench-long-job: bootstrap ## a job of 150 s on a broker that lets a message be held for 5 s
	$(PY) -m benchmarks.long_job $(BENCH_FLAGS)

access-matrix: bootstrap ## every route of every service with every credential: expected and seen, as a table
	@$(PY) -m benchmarks.access_matrix $(BENCH_FLAGS)

bench-amplification: bootstrap ## what hostile bodies cost a gateway and a registry: memory, time, the answer
	$(PY) -m benchmarks.amplification $(BENCH_FLAGS)

bench-hostile: bootstrap ## a valid caller beside 8,000 hostile connections: answers, p99, memory
	$(PY) -m benchmarks.hostile $(BENCH_FLAGS)

bench-deaths: bootstrap ## the model's process is killed every 5 s under 16 callers; os._exit in 1 of 50 requests
	$(PY) -m benchmarks.deaths $(BENCH_FLAGS)

bench-killer: bootstrap ## 64 requests in hand, one of which kills the model, Triton or the worker
	$(PY) -m benchmarks.killer $(BENCH_FLAGS)

bench-chaos: bootstrap ## 20,000 jobs while every part is killed with -9 and restarted once
	$(PY) -m benchmarks.chaos $(BENCH_FLAGS)

bare-test: ## the same as a new user, in a container with nothing but git, make and python3
	@exec tests/bare/run.sh

# Needs a container engine and compose; no Python but the system's. Variables: docs/compose.md.
COMPOSE_FLAGS ?=
compose-up: ## the same in containers: build the images, start everything, serve the example
	@$(FIND_PYTHON); exec "$$p" -m deploy.compose up $(COMPOSE_FLAGS)

compose-down: ## stop the containers; COMPOSE_FLAGS=--volumes forgets the data too
	@$(FIND_PYTHON); exec "$$p" -m deploy.compose down $(COMPOSE_FLAGS)

compose-test: bootstrap-dev ## the containers for real: losses, scale, and nothing left; skipped without an engine
	$(PY) -m pytest $(PYTEST_FLAGS) -rs tests/compose

# Needs `uv` on PATH. Services first: the tests share their versions.
LOCK = uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.11
lock: ## lock the requirements anew
	$(LOCK) $(LOCK_FLAGS) requirements.in -o requirements.lock
	$(LOCK) $(LOCK_FLAGS) requirements-dev.in -o requirements-dev.lock
	$(LOCK) $(LOCK_FLAGS) requirements-model.in -o requirements-model.lock
	$(LOCK) $(LOCK_FLAGS) --no-deps requirements-triton.in -o requirements-triton.lock
