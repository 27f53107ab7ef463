# make demo    prepare, train, sample and evaluate on one CPU
# make test    the tests
# make soak    twenty minutes of kills, lost ranks, full disks and damaged files
# make study   seven to eight hours: which of the paper's claims hold; goes on where it was stopped
# make bench   the benchmarks
# Each sets up .venv by itself. A second demo in the same folder needs leave to replace the first:
#     make demo DEMO_FLAGS=--overwrite
# DEMO_FLAGS also shortens it: make demo DEMO_FLAGS="--max_iters=20 --index_warmup_iters=8"
PYTHON ?= python3
BIN = .venv/bin
DEMO_OUT ?= out
DEMO_FLAGS ?=
EVAL_FLAGS ?= --max_tokens=200000

SOAK_FLAGS ?= --seed=0
STUDY_FLAGS ?=

.PHONY: demo test soak study bench clean

.venv/ready: requirements.txt requirements-dev.txt requirements-extra.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements-dev.txt -r requirements-extra.txt
	touch $@

demo: .venv/ready
	$(BIN)/python prepare.py --dataset demo
	$(BIN)/python train.py config/gsa_demo.py --out_dir=$(DEMO_OUT) $(DEMO_FLAGS)
	$(BIN)/python sample.py --out_dir=$(DEMO_OUT) --num_samples=1 --start="def main("
	$(BIN)/python eval.py --out_dir=$(DEMO_OUT) $(EVAL_FLAGS)

test: .venv/ready
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup tests

soak: .venv/ready
	$(BIN)/python tests/soak_training.py $(SOAK_FLAGS)
	$(BIN)/python tests/soak_ranks.py $(SOAK_FLAGS)
	$(BIN)/python tests/fault_injection.py --seconds=300 $(SOAK_FLAGS)

study: .venv/ready
	$(BIN)/python study.py $(STUDY_FLAGS)
	$(BIN)/python study.py --table --plot

bench: .venv/ready
	$(BIN)/python bench.py

clean:
	rm -rf .venv data out
