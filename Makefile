# Everything from a clean clone: `make demo` and `make test` set up .venv first, pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

WHEEL_ENV := .venv-wheel

.PHONY: demo test test-wheel lint format model-cards clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadscope $(ARGS)

# The wheel in an empty environment, with what it requires and the extra for cards: missing package data is noticed here.
test-wheel: $(STAMP)
	rm -rf $(WHEEL_ENV) build
	$(PYTHON) -m venv $(WHEEL_ENV)
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(WHEEL_ENV)/dist .
	$(WHEEL_ENV)/bin/python -m pip install --quiet --constraint constraints.txt "$$(echo $(WHEEL_ENV)/dist/*.whl)[card]"
	cd $(WHEEL_ENV) && bin/python -P ../tests/wheel.py
	rm -rf $(WHEEL_ENV) build

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
	rm -rf .venv $(WHEEL_ENV) demo-output
