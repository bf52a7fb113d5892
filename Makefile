# Everything from a clean clone: `make demo` and `make test` set up .venv first, pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint format model-cards clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadscope $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

model-cards: $(STAMP)
	$(BIN)/python examples/model_cards.py $(ARGS)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf .venv demo-output
