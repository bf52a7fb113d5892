# Everything from a clean clone: `make demo` and `make test` set up .venv first, pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

WHEEL_ENV := .venv-wheel

BROWSER := examples/browser

SPACE := .venv/.space

.PHONY: demo browser-demo space-demo space-packages test test-wheel lint format docs model-cards clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(ARGS)

# A page that runs the models in MODELS; needs Node.js for its packages, and Python alone to be served.
browser-demo: $(BROWSER)/node_modules
	@test -n "$(MODELS)" || { echo "say where the models are: make browser-demo MODELS=FOLDER"; exit 1; }
	$(PYTHON) $(BROWSER)/serve.py "$(MODELS)" $(ARGS)

$(BROWSER)/node_modules: $(BROWSER)/package-lock.json
	cd $(BROWSER) && npm ci --ignore-scripts
	touch $@

# A page that asks a base and its compressed form the same, at http://127.0.0.1:7860/.
space-demo: $(SPACE)
	$(BIN)/python examples/space/app.py $(ARGS)

space-packages: $(SPACE)

$(SPACE): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[space]'
	touch $@

# Three processes for two cores, since many tests wait for other processes.
test: $(STAMP)
	$(BIN)/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder $(ARGS)

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

# The site, into site/; a broken link is an error.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	$(BIN)/python -m mkdocs build --strict $(ARGS)

model-cards: $(STAMP)
	$(BIN)/python examples/model_cards.py $(ARGS)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf .venv $(WHEEL_ENV) $(BROWSER)/node_modules demo-output site
