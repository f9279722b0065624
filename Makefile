# Needs Python 3.11 and make; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONHASHSEED := 0

.PHONY: book pdf test attack notebooks clean

book: .venv/ready
	$(BIN)/jupyter-book build . --all -W -n --keep-going
	@echo "open _build/html/index.html"

pdf: .venv/ready
	@if ! command -v xelatex >/dev/null || ! command -v latexmk >/dev/null; \
	then echo "no PDF: it needs xelatex and latexmk, which come with TeX Live"; \
	else $(BIN)/jupyter-book build . --builder pdflatex && echo "see _build/latex/"; fi

test: .venv/ready
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest

attack: .venv/ready
	$(BIN)/april attack --arch B --out attack.png

notebooks: .venv/ready
	$(BIN)/python tools/execute.py

clean:
	rm -rf _build .venv attack.png

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check 'pip>=25.1'   # the first that knows groups
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e . --group dev
	touch $@
