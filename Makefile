# make demo [QUICK=1]   the main job on the small model that ships with the repository
# make test             linter and tests
# make faults           kills, full disks, two runs at once: all of them, to research/results/faults.json (half an hour)
# make fuzz             a million damaged files, to research/results/fuzz.json (half an hour)
# make audit            known vulnerabilities of what is installed, where the index answers, and its licences
# make docs             the pages in docs/ and the API reference, to build/site; a warning is an error
# make real DATA=FOLDER every method on a real model, see docs/real-models.md (hours; goes on where it was)
# make anywhere MODEL=FOLDER  export a compressed model to every format and run each in its engine, see docs/anywhere.md
# All set up .venv first: torch's CPU build where there is no accelerator, everything else as in constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPU_WHEELS := https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check

.PHONY: setup demo test faults fuzz audit docs real anywhere lint types
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tenfold needs Python 3.11 or newer; call make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch and the other libraries (a minute or two) ..."
	@if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then $(PIP) 'torch>=2.13,<2.14'; \
	else $(PIP) torch==2.13.0+cpu 2>/dev/null || $(PIP) torch==2.13.0+cpu --index-url $(CPU_WHEELS); fi
	@$(PIP) -c constraints.txt -e '.[test,docs]' 2>&1 | grep -v '^WARNING' || true
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib tenfold tenfold_cli >/dev/null || true  # pip would do it on one core
	@$(BIN)/python -c 'import tenfold_cli'
	@touch $@

demo: setup
	@$(BIN)/python examples/demo.py $(if $(QUICK),--quick)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

# the shapes that signatures promise are checked at run time, but where torch.compile traces
test: lint
	$(BIN)/python -m pytest -n logical --dist worksteal -m 'not traced and not real and not engines' --jaxtyping-packages=tenfold.structure,tenfold.nn,shapes.checked
	$(BIN)/python -m pytest -n logical -m traced

faults: setup
	TENFOLD_LONG=10000 $(BIN)/python -m pytest tests/faults/test_long_runs.py
	$(BIN)/python tests/faults/run.py

fuzz: setup
	$(BIN)/python tests/fuzz/run.py

audit: setup
	@$(PYTHON) -m venv build/audit && build/audit/bin/pip install --quiet --disable-pip-version-check pip-audit pip-licenses
	build/audit/bin/pip-licenses --python $(BIN)/python --order license --partial-match --fail-on 'GPL;SSPL;Commons Clause'
	build/audit/bin/pip-audit --path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') --progress-spinner off

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

real: setup
	@test -n "$(DATA)" || { echo "give the folder with the texts: make real DATA=FOLDER (docs/real-models.md says what is in it)"; exit 2; }
	@$(PIP) -c constraints.txt -e '.[real]'
	$(BIN)/python research/benchmarks/real_models.py --data $(DATA) $(REAL)
	$(BIN)/python research/benchmarks/real_table.py

anywhere: setup
	@test -n "$(MODEL)" || { echo "give a compressed model: make anywhere MODEL=FOLDER"; exit 2; }
	@$(PIP) -c constraints.txt -e '.[gguf,onnx]'
	$(BIN)/python research/benchmarks/anywhere.py $(MODEL)
