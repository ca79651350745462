# make quickstart   trains and tests a model from nothing but this folder and PyPI, and searches with it
# make test         the tests, in the same environment
# make test-slow    the long tests too
# make lowest       a part of the tests with the lowest supported versions (about four minutes, 6 GB); CI calls it
# make versions     the same, and with the newest supported versions too
# make kills        kills runs at random moments and takes them up again: nothing may be lost (about ten minutes)
# make coverage     the default tests, and how much of the code they run: 95% of the lines and 90% of the branches at least
# make mutants      small changes to losses, batches and metrics, each of which a test must notice (two hours)
# make search-demo  searches the quickstart's images by a command and on the page, of which it takes screenshots
# make app-test     the page of icone app in a headless Chromium, with screenshots in build/app
# make check        ruff and mypy
# make docs         builds the documentation site into site/, checks it, runs its tutorials and a small quickstart
# make wheel        builds the wheel into dist/ and tries it in a clean environment
# make smoke        every experiment of the paper on a handful of scenes, in minutes: that it runs from data to page
# make bench        how fast it is, beside bare loops and peers: every table of docs/performance.md (80 minutes, on a quiet machine)
# make gpu          all that a GPU could break or measure, on one card in under nine minutes; without a card it says so
# make fuzz         the tests of random input, with fifty times as many inputs as make test tries, and others each time
# make model-card   MODEL_CARD.md and its pictures, from the quickstart's run
# make reproduce    every experiment in miniature, and its page and pictures into docs/reproduction (about an hour)

VENV := .venv
PYTHON := $(VENV)/bin/python
OUTPUT := outputs/quickstart
INDEX := outputs/quickstart-index
SENTENCES := "an animal to the left of a fruit" "something to drink on a pink background" "a vehicle above a tool"
# accelerate launch would use one core.
CORES := $(shell python3 -c 'import os; print(os.cpu_count())')

# glibc gives every large buffer back to the kernel after each step and asks for it again in the next. Keeping them makes
# training on a CPU about twice as fast (encoders only: 35 -> 82 pictures/s, forward and backward, 2 cores).
export MALLOC_TRIM_THRESHOLD_ := 100000000000
export MALLOC_MMAP_MAX_ := 0
# Nothing is fetched from the model hub.
export HF_HUB_OFFLINE := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: quickstart test test-slow coverage mutants lowest versions kills search-demo app-test check docs wheel smoke bench gpu fuzz model-card reproduce clean

quickstart: outputs/towers/minilm/config.json
	@echo "[3/5] Training both stages and testing: log and checkpoints in $(OUTPUT)"
	$(VENV)/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(CORES) examples/train.py examples/configs/quickstart.yaml --output_dir $(OUTPUT) --resume_from_checkpoint auto
	@echo "[4/5] Testing the saved checkpoint in a process of its own, and drawing what it retrieves"
	$(PYTHON) examples/evaluate.py $(OUTPUT) openmoji-scenes --split test --num_test_groups 500 --image_size 160 \
		--grid $(OUTPUT)/retrieval.png
	@echo "[5/5] Indexing its test images, and answering three sentences with images"
	$(VENV)/bin/icone index $(OUTPUT) openmoji-scenes $(INDEX) --split test --num_test_groups 500 --image_size 160
	$(PYTHON) examples/search.py $(INDEX) $(SENTENCES) --grid $(INDEX)/found.png

$(VENV)/quickstart: pyproject.toml constraints.txt
	@echo "[1/5] Installing into $(VENV) (about 2 minutes, 2 GB)"
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --disable-pip-version-check -c constraints.txt torch
	$(PYTHON) -m pip install --disable-pip-version-check -c constraints.txt -e '.[quickstart]'
	touch $@

outputs/towers/minilm/config.json: $(VENV)/quickstart
	@echo "[2/5] Writing the two pretrained towers"
	$(PYTHON) examples/prepare_offline_towers.py outputs/towers
	touch $@

$(VENV)/dev: $(VENV)/quickstart
	$(PYTHON) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# Single files of these two are references in tests. They ask for torchvision, which nothing here uses.
	$(PYTHON) -m pip install --disable-pip-version-check --no-deps open_clip_torch==3.3.0 clip-benchmark==1.6.2
	touch $@

# Two workers of a core each; one that is done takes over half of what the other has left. The slowest tests are named,
# since all together should stay under 15 minutes.
test: $(VENV)/dev
	$(PYTHON) -m pytest -n 2 --dist worksteal --durations 20 --durations-min 5

test-slow: $(VENV)/dev
	$(PYTHON) -m pytest -n 2 --dist worksteal -m "not docs and not wheel and not browser"

coverage: $(VENV)/dev
	$(PYTHON) -m pytest -n 2 --dist worksteal --cov --cov-report=term-missing:skip-covered --cov-report=json:build/coverage.json
	$(PYTHON) -c "import json; total = json.load(open('build/coverage.json'))['totals']; \
		lines, branches = total['covered_lines'] / total['num_statements'], total['covered_branches'] / total['num_branches']; \
		print(f'{lines:.1%} of the lines, {branches:.1%} of the branches'); assert lines >= 0.95 and branches >= 0.9"

mutants: $(VENV)/dev
	$(PYTHON) -m mutmut run
	$(PYTHON) -m mutmut results

# Pythons of pyenv are found where there are any.
NOX = PATH="$$PATH:$$(echo $$HOME/.pyenv/versions/3.1[03].*/bin | tr ' ' ':')" $(PYTHON) -m nox

lowest: $(VENV)/dev
	$(NOX) -s lowest

versions: $(VENV)/dev
	$(NOX)

kills: $(VENV)/dev
	rm -rf outputs/kills
	PYTHONPATH=.:tests $(PYTHON) tests/kill_driver.py outputs/kills/train --kills 30
	PYTHONPATH=.:tests $(PYTHON) tests/kill_driver.py outputs/kills/two --kills 30 --processes 2
	PYTHONPATH=.:tests $(PYTHON) tests/kill_driver.py outputs/kills/alone --kills 30 --processes 2 --alone
	PYTHONPATH=.:tests $(PYTHON) tests/kill_driver.py outputs/kills/encode --kills 30 --work encode
	PYTHONPATH=.:tests $(PYTHON) tests/kill_driver.py outputs/kills/export --kills 15 --work export

search-demo: quickstart $(VENV)/dev
	@command -v chromium > /dev/null || { echo "Chromium is missing: apt-get install chromium"; exit 1; }
	$(PYTHON) -m benchmarks.search_demo $(INDEX)

app-test: $(VENV)/dev
	@command -v chromium > /dev/null || { echo "Chromium is missing: apt-get install chromium"; exit 1; }
	$(PYTHON) -m pytest -m browser

check: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/dev
	$(PYTHON) -m pytest -m docs

wheel: $(VENV)/dev
	rm -rf build dist
	$(PYTHON) -m build --wheel
	$(PYTHON) -m pytest -m wheel

smoke: $(VENV)/quickstart
	$(VENV)/bin/icone reproduce all --smoke

bench: $(VENV)/dev outputs/towers/minilm/config.json
	$(PYTHON) -m benchmarks all

gpu: $(VENV)/dev outputs/towers/minilm/config.json
	$(PYTHON) -m benchmarks.gpu

fuzz: $(VENV)/dev
	$(PYTHON) -m pytest tests/fuzz --hypothesis-profile fuzz --hypothesis-show-statistics

model-card: quickstart
	$(PYTHON) -m benchmarks.model_card $(OUTPUT)

reproduce: $(VENV)/quickstart
	$(VENV)/bin/icone reproduce all --miniature
	mkdir -p docs/reproduction/figures
	cp outputs/reproduction-miniature/README.md outputs/reproduction-miniature/results.json docs/reproduction/
	cp outputs/reproduction-miniature/figures/* docs/reproduction/figures/

clean:
	rm -rf outputs build dist site
