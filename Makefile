# make demo: prepare, train, evaluate and sample on one CPU.   make test: the tests.   make bench: the benchmarks.
# Each sets up .venv by itself. DEMO_FLAGS shortens the demo: make demo DEMO_FLAGS="--max_iters=20 --index_warmup_iters=8 --short_iters=4"
PYTHON ?= python3
BIN = .venv/bin
DEMO_OUT ?= out
DEMO_FLAGS ?=
EVAL_FLAGS ?= --max_tokens=200000

.PHONY: demo test bench clean

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
	$(BIN)/python -m pytest -q tests

bench: .venv/ready
	$(BIN)/python bench.py

clean:
	rm -rf .venv data out
