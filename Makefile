# Every target makes the environment first where it is missing or older than pyproject.toml; nothing needs activating.

RECIPE ?= r4-joint
RECIPES ?= r1-llm-only r2-vision-only r3-two-stage r4-joint
SCALE ?= auto
PORT ?=
ARGS ?=
PYTEST_ARGS ?=

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What a run prints reaches the terminal as it is printed; a run that fails ends with its error.
PAPERMILL := $(BIN)/papermill --no-progress-bar --log-level WARNING --stdout-file - --stderr-file -
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 15
# Paths reach the shell in its environment and as they were typed, so that spaces, quotes and dollars stay what they are.
$(foreach name,A B MODEL INPUT OUTPUT RUN,$(eval override export $(name) := $$(value $(name))))
# $(call needs,NAME,an example): the value of NAME for the shell, or one sentence where it is missing
needs = $(if $($(1)),"$$$(1)",$(error $(1)= is missing; $(2)))

.DEFAULT_GOAL := help
.PHONY: help setup demo lab sync run recipes table compare app serve predict export test test-all bench notebooks clean

help: ## show the targets and what they take
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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
	@mkdir -p runs/demo
	$(PAPERMILL) pipeline.ipynb runs/demo/demo.ipynb -p recipe r1-llm-only -p scale tiny -p output_root runs/demo $(ARGS)

lab: sync ## open the pipeline in JupyterLab
	$(BIN)/jupyter lab pipeline.ipynb

sync: $(STAMP) ## make each notebook and its .py the same; the side that changed wins (TAKE=py|ipynb where both have)
	$(BIN)/python -m helpers.dev.pairs $(if $(TAKE),--take $(TAKE))

run: sync ## run one recipe: RECIPE=r4-joint GPUS=0,1 SCALE=auto ARGS='-p epochs 1'
	@mkdir -p runs
	$(PAPERMILL) pipeline.ipynb "runs/$(RECIPE).ipynb" -p recipe "$(RECIPE)" -p scale "$(SCALE)" \
		$(if $(GPUS),-p gpus "$(GPUS)") $(ARGS)

recipes: ## run all four recipes, one after the other: GPUS=0,1 RECIPES='r1-llm-only r4-joint'
	@for recipe in $(RECIPES); do $(MAKE) --no-print-directory run RECIPE=$$recipe || exit 1; done

table: $(STAMP) ## show the results of all runs in runs/ (ARGS=--write: into results.json and README; ARGS=--check)
	$(BIN)/python -m helpers.evaluate table $(ARGS)

compare: $(STAMP) ## compare two runs on the same pictures: A=r4-joint B=r1-llm-only
	$(BIN)/python -m helpers.evaluate compare $(call needs,A,make compare A=r4-joint B=r1-llm-only) \
		$(call needs,B,make compare A=r4-joint B=r1-llm-only)

app: $(STAMP) ## a page to try a finished model: MODEL=runs/...-merged (the newest where left out) PORT=7860
	$(BIN)/python -m helpers.use.page $(if $(MODEL),"$$MODEL") --port $(or $(PORT),7860) $(ARGS)

serve: $(STAMP) ## an OpenAI-compatible server of a finished model: MODEL=runs/...-merged PORT=8000
	$(BIN)/python -m helpers.use.serve $(if $(MODEL),"$$MODEL") --port $(or $(PORT),8000) $(ARGS)

predict: $(STAMP) ## boxes for many photos: INPUT=photos or a data set, OUTPUT=folder MODEL=... ARGS='--coco --crops'
	$(BIN)/python -m helpers.use.photos $(call needs,INPUT,make predict INPUT=photos OUTPUT=boxes) \
		$(call needs,OUTPUT,make predict INPUT=photos OUTPUT=boxes) $(if $(MODEL),--model "$$MODEL") $(ARGS)

export: $(STAMP) ## bf16 and 4-bit copies of a merged model, each with its model card: MODEL=runs/...-merged (OUTPUT= PUSH=user/name)
	$(BIN)/python -m helpers.use.export $(call needs,MODEL,make export MODEL=runs/qwen2vl-nutrition-detection-r4-joint-merged) \
		$(if $(OUTPUT),--output "$$OUTPUT") $(if $(RUN),--run "$$RUN") $(if $(PUSH),--push "$(PUSH)") $(ARGS)

test: $(STAMP) ## style, types and tests, minutes on 2 cores (PYTEST_ARGS='-k boxes')
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-all: $(STAMP) ## the long tests too: whole notebooks, headline numbers, kills at random moments, much broken input
	$(BIN)/ruff check .
	$(BIN)/mypy
	KILL_TEST=1 FUZZ=100 $(PYTEST) $(PYTEST_ARGS)

bench: $(STAMP) ## speed against stock TRL and Unsloth, in turns: 7B on a GPU (40 GB of disk), else tiny (ARGS='--minutes 9')
	$(BIN)/python -m helpers.dev.bench $(ARGS)

notebooks: sync ## run every notebook and refresh its committed outputs (ARGS=notebooks/x.ipynb for one)
	$(BIN)/python -m helpers.dev.execute $(ARGS)

clean: ## remove caches and the demo's run; keeps .venv and every other run
	rm -rf runs/demo build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
