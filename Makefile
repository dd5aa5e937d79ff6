# `make demo` and `make test` each work as the first command in a bare clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := outputs/demo

.PHONY: demo demo-sd3 demo-compress label test test-browser test-slow check results notebooks clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first and alone: whatever wheel the constraint finds (a CPU one will do) then satisfies everything else
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,rewards]'
	touch $@

demo: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/python -m align.train --config configs/dpo_shapes.yaml --output_dir $(DEMO) --overwrite_output_dir true
	$(BIN)/python -m align.evaluate --config configs/evaluate_shapes.yaml --tuned $(DEMO)

demo-sd3: $(STAMP)
	rm -rf $(DEMO)-sd3
	$(BIN)/python -m align.train --config configs/dpo_shapes_sd3.yaml --output_dir $(DEMO)-sd3 --overwrite_output_dir true
	$(BIN)/python -m align.evaluate --config configs/evaluate_shapes.yaml --tuned $(DEMO)-sd3 --guidance_scale 1

demo-compress: $(STAMP)
	rm -rf outputs/compress
	$(BIN)/python -m pruning.compress --config configs/compress_shapes_sd3.yaml

label: $(STAMP)  # the page on which people choose, on preferences that ship with the package
	mkdir -p outputs/label
	$(BIN)/python -m align.label shapes-preferences --split heldout --output outputs/label/answers.jsonl

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-browser: $(STAMP)  # `make test` runs these too where both are there
	command -v chromium || (apt-get update && apt-get install -y --no-install-recommends chromium)
	$(BIN)/python -m pytest -m browser

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

results: $(STAMP)  # tests/benchmarks/results/*.json -> tests/benchmarks/README.md
	$(BIN)/python -m tests.benchmarks.table

notebooks: $(STAMP)  # all of notebooks/ anew, with their outputs
	$(BIN)/python -m tests.notebooks

clean:
	rm -rf $(VENV) outputs build *.egg-info
