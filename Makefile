# make demo and make test each work alone in a fresh clone; everything lives in .venv and runs/.
PYTHON ?= python3
DEMO ?= world
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo gallery test chaos fuzz lint format bench clean

setup: $(STAMP)

# uv takes torch and torchvision from one index, so that they match; CUDA builds on Linux, where a
# machine without a GPU runs them on the CPU.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and f"zoetrope needs Python 3.11 or newer, this is {v[0]}.{v[1]}; try make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@command -v uv >/dev/null || test -x $(BIN)/uv || $(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^uv==' constraints.txt)"
	@echo "installing into $(VENV) ..."
	@PATH="$(CURDIR)/$(BIN):$$PATH" uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/python -m train.demo $(DEMO)

# After the demo: its examples of each ability, as a page of the documentation.
gallery: setup
	@$(BIN)/python -m train.gallery $(DEMO)

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Kills runs with SIGKILL, ten times each, and continues them; the result goes to docs/chaos.md.
chaos: setup
	CHAOS_KILLS=10 $(BIN)/python -m pytest tests/distributed/test_chaos.py -k long

# A thousand damaged media files through reader, check, loader and ingest; the suite has ninety.
fuzz: setup
	FUZZ_FILES=1000 $(BIN)/python -m pytest tests/data/test_fuzz.py --timeout 3000

# ruff (lint and format) and pyright, as .pre-commit-config.yaml lists them
lint: setup
	$(BIN)/pre-commit run --all-files

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m benchmarks.dit_step
	$(BIN)/python -m benchmarks.wan_step
	$(BIN)/python -m benchmarks.feature_reuse
	$(BIN)/python -m benchmarks.rolling
	$(BIN)/python -m benchmarks.parallel
	$(BIN)/python -m benchmarks.checkpoints
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.text_detector

clean:
	rm -rf $(VENV) build *.egg-info
