# make demo     train Unbiased Teacher + IMWA on digit scenes, with table, curves and pictures
# make compare  the same beside supervised, plain Unbiased Teacher and twice the iterations
# make demo-classification  CE, MFW, BTM and ECL on long-tailed digits, each plain and with IMWA, in
#               five minutes of one core (a second thread gains little, and much is lost if it waits)
# make demo-semi  FixMatch, DASO and ACR with few labels, each plain and with IMWA, beside the labeled images alone;
#               two seeds, each on a core
# make test     lint, types and the fast tests;  make test-all  the slow ones, too
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := output/digits_unbiased_teacher_imwa
COMPARED := digits_supervised digits_unbiased_teacher digits_unbiased_teacher_2x
SEMI := configs/tables/cissic_small.yaml --rows Supervised FixMatch "FixMatch + IMWA" \
	"FixMatch + DASO" "FixMatch + DASO + IMWA" "FixMatch + ACR" "FixMatch + ACR + IMWA" --seeds
TRAIN = $(BIN)/python tools/train_net.py --resume --config-file

.PHONY: demo compare demo-classification demo-semi test test-all lint clean

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq --editable .[dev]
	touch $@

demo: $(INSTALLED)
	$(TRAIN) configs/digits/unbiased_teacher_imwa.yaml
	$(BIN)/python tools/plot_results.py $(DEMO)
	$(BIN)/python tools/visualize.py $(DEMO)

compare: demo
	$(TRAIN) configs/digits/supervised.yaml
	$(TRAIN) configs/digits/unbiased_teacher.yaml
	$(TRAIN) configs/digits/unbiased_teacher.yaml configs/digits/2x.yaml
	$(BIN)/python tools/compare_runs.py $(COMPARED:%=output/%) $(DEMO)

demo-classification: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tools/reproduce.py configs/tables/digits_demo.yaml
	$(BIN)/python tools/analyze.py classes output/digits_demo/btm_seed1
	$(BIN)/python tools/analyze.py confusion output/digits_demo/btm_seed1

demo-semi: export OMP_NUM_THREADS = 1
demo-semi: $(INSTALLED)
	$(BIN)/python tools/reproduce.py $(SEMI) 1 > /dev/null & \
	$(BIN)/python tools/reproduce.py $(SEMI) 2 && wait $$!
	$(BIN)/python tools/reproduce.py $(SEMI) 1 2 --print-only

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
