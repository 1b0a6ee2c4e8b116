# Every target makes the environment first where it is missing or older than pyproject.toml; nothing needs activating.

RECIPE ?= r4-joint
RECIPES ?= r1-llm-only r2-vision-only r3-two-stage r4-joint
SCALE ?= auto
GPUS ?=
MODEL ?=
PORT ?=
INPUT ?=
OUTPUT ?=
ARGS ?=
PYTEST_ARGS ?=
# Paths reach the shell in its environment and as they were typed, so that spaces, quotes and dollars stay what they are.
$(foreach name,MODEL INPUT OUTPUT RUN,$(eval override export $(name) := $$(value $(name))))

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Outputs reach the terminal as they are made; a run that fails ends with its error.
PAPERMILL := $(BIN)/papermill --log-output --no-progress-bar
ON_GPUS := $(BIN)/python -m helpers.dev.gpus '$(GPUS)'

.DEFAULT_GOAL := help
.PHONY: help setup demo app serve predict test test-all lint types sync lab run recipes rerun table compare export prompts \
	collators bench notebooks tiny-base kill-test fuzz test-newest env lock clean

help: ## show the targets and what they take
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install the project into it (again when pyproject.toml changes)

# On Linux exactly the files that requirements.lock names by their hashes, elsewhere what pyproject.toml asks for.
$(STAMP): pyproject.toml requirements.lock
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; install it, or name it: make PYTHON=/path/to/python3.11 setup" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "installing into $(VENV): some minutes, about 7 GB"
	if [ "$$(uname -s)" = Linux ]; then \
		$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement requirements.lock && \
		$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable . ; \
	else $(BIN)/python -m pip install --quiet --editable '.[serve,test]' ; fi
	@touch $@

demo: sync ## fine-tune the tiny model on the embedded photos: minutes on a CPU, offline
	mkdir -p runs/demo
	$(PAPERMILL) pipeline.ipynb runs/demo/demo.ipynb -p recipe r1-llm-only -p scale tiny -p output_root runs/demo $(ARGS)

app: $(STAMP) ## a page to try a finished model: MODEL=runs/...-merged (the newest where left out) PORT=7860
	$(BIN)/python -m helpers.app $(if $(MODEL),"$$MODEL") --port $(or $(PORT),7860) $(ARGS)

serve: $(STAMP) ## an OpenAI-compatible server of a finished model: MODEL=runs/...-merged PORT=8000
	$(BIN)/python -m helpers.serve $(if $(MODEL),"$$MODEL") --port $(or $(PORT),8000) $(ARGS)

predict: $(STAMP) ## boxes for many photos: INPUT=photos or a data set, OUTPUT=folder MODEL=... ARGS='--coco --crops'
	$(BIN)/python -m helpers.many $(if $(INPUT),"$$INPUT",$(error INPUT= is missing; make predict INPUT=photos OUTPUT=boxes)) \
		$(if $(OUTPUT),"$$OUTPUT",$(error OUTPUT= is missing; make predict INPUT=photos OUTPUT=boxes)) \
		$(if $(MODEL),--model "$$MODEL") $(ARGS)

PYTEST = $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 15

test: lint types ## run the tests, minutes on 2 cores (PYTEST_ARGS='-k boxes')
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-all: lint types ## run the long tests too: whole notebooks, headline numbers, kills at random moments
	$(PYTEST) $(PYTEST_ARGS)

lint: $(STAMP) ## check the code's style
	$(BIN)/ruff check .

types: $(STAMP) ## check the types in helpers/
	$(BIN)/mypy

sync: $(STAMP) ## make each notebook and its .py the same; the side that changed wins (TAKE=py|ipynb where both have)
	$(BIN)/python -m helpers.dev.pairs sync $(if $(TAKE),--take $(TAKE))

lab: sync ## open the pipeline in JupyterLab
	$(BIN)/jupyter lab pipeline.ipynb

run: run-$(RECIPE) ## run one recipe: RECIPE=r4-joint GPUS=0,1 SCALE=auto ARGS='-p epochs 1'

recipes: $(RECIPES:%=run-%) ## run all four recipes; side by side: make -j2 recipes GPUS='0,1 2,3'

run-%: sync
	@mkdir -p runs
	$(ON_GPUS) $(PAPERMILL) pipeline.ipynb runs/$*.ipynb -p recipe $* -p scale $(SCALE) $(ARGS)

rerun: sync ## repeat a run from its manifest: RUN=runs/qwen2vl-nutrition-detection-r4-joint
	$(BIN)/python -m helpers.dev.rerun $(if $(RUN),"$$RUN",$(error RUN= is missing; make rerun RUN=runs/qwen2vl-nutrition-detection-r4-joint)) $(ARGS)

table: $(STAMP) ## show the results of all runs in runs/ (ARGS=--write: into results.json and README; ARGS=--check)
	$(BIN)/python -m helpers.evaluate table $(ARGS)

compare: $(STAMP) ## compare two runs on the same pictures: A=r4-joint B=r1-llm-only
	$(BIN)/python -m helpers.evaluate compare $(if $(A),$(A),$(error A= is missing; make compare A=r4-joint B=r1-llm-only)) \
		$(if $(B),$(B),$(error B= is missing; make compare A=r4-joint B=r1-llm-only))

export: $(STAMP) ## bf16 and 4-bit copies of a merged model, each with its model card: MODEL=runs/...-merged (OUTPUT= PUSH=user/name)
	$(BIN)/python -m helpers.export $(if $(MODEL),"$$MODEL",$(error MODEL= is missing; make export MODEL=runs/qwen2vl-nutrition-detection-r4-joint-merged)) \
		$(if $(OUTPUT),--output "$$OUTPUT") $(if $(RUN),--run "$$RUN") $(if $(PUSH),--push $(PUSH)) $(ARGS)

prompts: $(STAMP) ## ask several prompts without training, in NF4 and bf16 (ARGS='--scale 7b')
	$(BIN)/python -m helpers.dev.prompts $(ARGS)

collators: $(STAMP) ## train on the answer alone and on all text, 3 seeds each, and compare: half an hour on a CPU
	$(BIN)/python -m helpers.dev.collators $(ARGS)

bench: sync ## measure speed against stock TRL, tiny and, where there is a GPU, 7B with random weights (40 GB of disk)
	@mkdir -p runs/bench
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/python -m helpers.dev.bench_7b --folder runs/bench --report notebooks/performance_7b.json $(ARGS); fi
	$(PAPERMILL) notebooks/07_performance.ipynb runs/bench/07_performance.ipynb --cwd notebooks

notebooks: sync ## run every notebook, refresh its committed outputs and thumbnail (ARGS=notebooks/x.ipynb for one)
	$(BIN)/python -m helpers.dev.execute $(ARGS)
	$(BIN)/python -m helpers.dev.thumbnails

tiny-base: $(STAMP) ## train the tiny base again, into runs/tiny-base: minutes on a GPU, hours on a CPU
	mkdir -p runs/tiny-base
	$(PAPERMILL) notebooks/00_tiny_base.ipynb runs/tiny-base/00_tiny_base.ipynb --cwd notebooks -p retrain True -p out $(CURDIR)/runs/tiny-base $(ARGS)

kill-test: $(STAMP) ## kill small runs of every recipe at random moments, and see that nothing is lost: minutes
	KILL_TEST=1 $(BIN)/python -m pytest tests/test_kill.py --capture no $(PYTEST_ARGS)

fuzz: $(STAMP) ## a hundred times the broken input that the tests try on parser, data and parameters: minutes
	FUZZ=100 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 tests/test_fuzz.py $(PYTEST_ARGS)

test-newest: $(STAMP) ## run the tests against the newest libraries, in .venv-newest, and say which have changed
	$(BIN)/python -m helpers.dev.newest --numprocesses auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

env: $(STAMP) ## write the conda files and requirements.txt from pyproject.toml and requirements.lock
	$(BIN)/python -m helpers.dev.environment

lock: ## write requirements.lock from pyproject.toml: every version and its files' hashes
	test -x .venv-lock/bin/uv || { "$(PYTHON)" -m venv .venv-lock && .venv-lock/bin/python -m pip install --quiet uv==0.13.9; }
	.venv-lock/bin/uv pip compile pyproject.toml --extra serve --extra test --universal --python-version 3.11 --generate-hashes \
		--no-annotate --custom-compile-command 'make lock' --quiet --upgrade --output-file requirements.lock

clean: ## remove caches and the demo's run; keeps .venv and every other run
	rm -rf runs/demo build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
