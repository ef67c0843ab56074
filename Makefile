# make demo   installs, compresses the bundled model, shows before and after
# make test   installs, checks style, runs every test that needs no GPU
# make style  formats and lints
# make docs   writes docs/options.md from the settings in sp3llm/options/
# make floor  runs the tests with the oldest release of every requirement (several GB of torch)
# make interop  loads compressed models with other tools, each in its own environment (long); the
#               encoders' part needs GLUE from a hub and fine-tunes a classifier

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The release the tests are pinned to; TORCH=torch takes whatever pip finds.
TORCH ?= torch==2.13.0
VENV_FLOOR ?= .floor
DEMO ?= demo-output
# A process a core, each with one thread: models of a test are too small for two.
PYTEST = OMP_NUM_THREADS=1 $(1)/python -m pytest -n logical --maxprocesses 8

.PHONY: demo test slow style docs floor interop install clean

install: $(VENV)/installed

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,eval,recover,quantize]'
	touch $@

demo: install
	$(BIN)/python -m sp3llm.compress --keep 0.75 --out $(DEMO)
	$(BIN)/python eval/checks/continue_prompt.py sp3llm/bundled/llama-8m $(DEMO)

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(call PYTEST,$(BIN)) -m 'not slow and not gpu'

slow: install
	$(call PYTEST,$(BIN))

style: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install
	$(BIN)/python -m sp3llm.options.reference > docs/options.md

floor:
	$(PYTHON) -m venv $(VENV_FLOOR)
	$(VENV_FLOOR)/bin/python -m pip install --quiet --no-deps -e .
	$(VENV_FLOOR)/bin/python eval/checks/floors.py > $(VENV_FLOOR)/floors.txt
	$(VENV_FLOOR)/bin/python -m pip install --quiet -r $(VENV_FLOOR)/floors.txt
	$(call PYTEST,$(VENV_FLOOR)/bin) -m 'not slow and not gpu'

interop: install
	$(BIN)/python eval/interop/interop.py --torch '$(TORCH)'
	$(BIN)/python eval/interop/interop_encoders.py --torch '$(TORCH)'

clean:
	rm -rf $(VENV) $(VENV_FLOOR) $(DEMO) .interop build *.egg-info .pytest_cache .ruff_cache
