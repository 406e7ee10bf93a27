# make env | demo | test | test-openmmlab | test-gpu | test-long | lint | docs. An active virtual or conda
# environment is used, else .venv is made.
CONDA_ENV := $(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX))
ENV ?= $(or $(VIRTUAL_ENV),$(CONDA_ENV),.venv)
PYTHON := $(ENV)/bin/python
# Empty: what is installed, else one that has a compiled mmcv, else the newest that was tested.
TORCH ?=
STAMP := $(ENV)/.mmscalablevit-installed
DEMO_DIR ?= work_dirs/demo
OPENMMLAB_ENV ?= .venv-openmmlab
OPENMMLAB_STAMP := $(OPENMMLAB_ENV)/.mmscalablevit-installed

.PHONY: env demo repeat test test-openmmlab test-gpu operator-free-tests test-long results-weights lint docs

env:
	@tools/misc/setup_env.sh "$(ENV)" $(TORCH)
	@touch "$(STAMP)"

$(STAMP): setup.py tools/misc/environment.sh tools/misc/setup_env.sh \
		tools/misc/mmcv_cxx.sh tools/misc/mmcv_wheel.sh
	@$(MAKE) --no-print-directory env

demo: $(STAMP)
	@PYTHON="$(abspath $(PYTHON))" tools/demo.sh "$(DEMO_DIR)"

# A process more than cores, as some tests wait for minutes; one thread each, as threads of several
# processes would wait for each other.
test: $(STAMP)
	OMP_NUM_THREADS=1 PYTEST_XDIST_AUTO_NUM_WORKERS=$$(($$(getconf _NPROCESSORS_ONLN) + 1)) \
		$(PYTHON) -m pytest --numprocesses auto --maxprocesses 4 \
		--dist loadfile --no-loadscope-reorder \
		$(PYTEST_ARGS)

# With the original OpenMMLab packages, in an environment of their own: what needs no compiled
# operator of mmcv. What does is skipped with that reason.
OPERATOR_FREE_TESTS := $(addprefix tests/, test_backbone.py test_checkpoint.py test_classification.py \
	test_compat.py test_configs.py test_layer_decay.py test_performance.py)
test-openmmlab: $(OPENMMLAB_STAMP)
	OMP_NUM_THREADS=1 $(OPENMMLAB_ENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 \
		--dist loadfile $(OPERATOR_FREE_TESTS) $(PYTEST_ARGS)

$(OPENMMLAB_STAMP): setup.py tools/misc/environment.sh tools/misc/setup_openmmlab.sh
	@tools/misc/setup_openmmlab.sh "$(OPENMMLAB_ENV)" $(or $(TORCH),torch==2.14.1 torchvision==0.29.1)
	@touch "$@"

operator-free-tests:
	@echo $(OPERATOR_FREE_TESTS)

# The backbone on CUDA; skipped with the reason where there is none.
test-gpu: $(STAMP)
	$(PYTHON) -m pytest tests/test_gpu.py $(PYTEST_ARGS)

# What takes minutes each and prints the figures of docs/reliability.md.
test-long: $(STAMP)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m long -rP --timeout 7200 --numprocesses auto --maxprocesses 4 \
		$(PYTEST_ARGS)

# make repeat TESTS='tests/test_distributed.py -k killed' TIMES=30: how often each fails.
TIMES ?= 30
repeat: $(STAMP)
	OMP_NUM_THREADS=1 $(PYTHON) tests/repeat.py $(TIMES) $(TESTS)

# The trained models of docs/results.md as release files, in half precision, named by their hash.
RESULTS_RUNS ?= $(wildcard $(addprefix work_dirs/*_, bccd-400x300 nuclei-256x256 camvid-320x240))
results-weights: $(STAMP)
	@for run in $(RESULTS_RUNS); do $(PYTHON) tools/model_converters/publish_model.py --half \
		$$run/$$(basename $$(cat $$run/last_checkpoint)) work_dirs/results-weights/$$(basename $$run); done

lint: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# The link to the repository is the address from which this checkout was cloned.
docs: export REPO_URL ?= $(filter http%,$(shell git remote get-url origin 2>/dev/null))
docs: $(STAMP)
	$(PYTHON) docs/model_zoo.py
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict
