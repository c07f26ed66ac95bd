# Each command makes its own environment (Python 3.11+, pip and a package index are enough).
PYTHON ?= python3
VENV ?= .venv
PEERS_VENV ?= .venv-peers
BIN = $(VENV)/bin
# More options of pytest for `make test`, such as --random-order.
PYTEST_ARGS ?=
# A file's tests run in one process, so that what they share is compiled once.
PYTEST = -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# Of torch, for `make test-versions`: the oldest supported and the newest two tried.
VERSIONS ?= 2.10 2.14 2.15
# What pdoc warns of, such as an annotation that it cannot resolve, is an error.
DOCS = PYTHONWARNINGS=error $(BIN)/python -m pdoc -d google -o build/docs vaekl '!vaekl.kernels'

.PHONY: help demo fast test test-versions test-slow test-peers docs which-kl bench codegen clean

help:
	@echo "make demo   train a small VAE on real digits with vaekl as its loss; figures in demo/"
	@echo "make fast   lint, types, values, gradients and contract, without the interpreter; a minute at most"
	@echo "make test   lint, types and the whole suite; PYTEST_ARGS=--random-order shuffles it"
	@echo "make test-versions  the suite on the oldest torch and triton supported, and on the newest"
	@echo "make test-slow  the machine code of every kernel variant, run too, and more draws (minutes)"
	@echo "make test-peers  values and gradients beside the code of diffusers, pythae, keras, ..."
	@echo "make docs   the API's documentation, in build/docs/"
	@echo "make which-kl  the trainings and figures of docs/which-kl.md"
	@echo "make bench  benchmarks of every backend this machine has; results in bench/out/"
	@echo "make codegen  a table of the kernels' machine code for four GPUs"
	@echo "make clean  remove the environment and what was built"

PIP = -m pip install --quiet --disable-pip-version-check --progress-bar off
# One stamp: the environment is made again when what it installs changes.
# $(call environment,its folder,its constraints)
define environment
	$(PYTHON) -m venv $(1)
	$(1)/bin/python $(PIP) -c $(2) --upgrade setuptools wheel torch triton
	$(1)/bin/python $(PIP) -c $(2) --no-build-isolation -e '.[cpu,demo,test]'
	touch $(1)/.installed
endef

$(VENV)/.installed: pyproject.toml constraints.txt constraints/common.txt
	$(call environment,$(VENV),constraints.txt)

demo: $(VENV)/.installed
	# One thread: two cost more in waiting than they save on matrices this small.
	OMP_NUM_THREADS=1 $(BIN)/python examples/digits.py

# Between two edits: eager and cpu, whose loops need no interpreter.
fast: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python $(PYTEST) -k "not triton" tests/values tests/gradients \
		$(addprefix tests/contract/test_,bad_input.py contract.py nn.py) tests/pytorch/test_ops.py

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(DOCS)
	$(BIN)/python $(PYTEST) $(PYTEST_ARGS)

# The whole suite on other versions of torch and triton, each in an environment of its own.
test-versions: $(addprefix test-torch-,$(VERSIONS))

test-torch-%: .venv-torch-%/.installed
	.venv-torch-$*/bin/python $(PYTEST) $(PYTEST_ARGS)

.PRECIOUS: .venv-torch-%/.installed
.venv-torch-%/.installed: pyproject.toml constraints/torch-%.txt constraints/common.txt
	$(call environment,.venv-torch-$*,constraints/torch-$*.txt)

test-slow: $(VENV)/.installed
	$(BIN)/python $(PYTEST) -m slow $(PYTEST_ARGS)

# What other projects ship, beside this one; the last ones where they install. Torch stays as
# pinned; what would bring another, or a torchvision that does not load beside it, comes alone.
PEERS_PIP = $(PEERS_VENV)/bin/python $(PIP) -c constraints.txt -c constraints-peers.txt

$(PEERS_VENV)/.installed: pyproject.toml constraints.txt constraints/common.txt constraints-peers.txt
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_PIP) setuptools wheel torch triton
	$(PEERS_PIP) --no-build-isolation -e '.[cpu,demo,test]'
	$(PEERS_PIP) diffusers pythae keras onnx onnxruntime onnxscript
	for peer in scvi-tools lerobot torchrl torch-geometric einops "--no-deps multivae" \
		"--no-deps stable-audio-tools"; do \
		$(PEERS_PIP) $$peer || echo "not compared: $$peer does not install here (reason above)"; \
	done
	touch $@

test-peers: $(PEERS_VENV)/.installed
	$(PEERS_VENV)/bin/python -m pytest tests/peers -m peers

docs: $(VENV)/.installed
	$(DOCS)

which-kl: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python examples/which_kl.py --out docs/which-kl
	$(BIN)/python bench/pages.py

bench: $(VENV)/.installed
	$(BIN)/python bench/run.py --out bench/out
	$(BIN)/python bench/cpu.py --out bench/out/cpu-detail.json
	$(BIN)/python bench/imports.py --out bench/out/imports.json
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-columns=min,median,iqr,rounds

codegen: $(VENV)/.installed
	$(BIN)/python bench/codegen.py --targets sm_80 sm_89 sm_90 sm_100 gfx942

clean:
	rm -rf $(VENV) $(PEERS_VENV) .venv-torch-* build demo *.egg-info .mypy_cache .pytest_cache .ruff_cache
