"""Re-executes the chapters in place and cleans them: `make notebooks`, or `python tools/execute.py nbs/07_*.ipynb`."""
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.export import nb_export

import chapters

ROOT = Path(__file__).resolve().parent.parent


def execute(path):
    """Runs every cell of one notebook that may run and stores its outputs."""
    notebook = nbformat.read(path, 4)
    client = NotebookClient(notebook, timeout=3600, kernel_name="python3", extra_arguments=["--log-level=ERROR"],
                            coalesce_streams=True,
                            resources={"metadata": {"path": ROOT / "nbs"}})
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            if cell.cell_type == "code" and chapters.split(cell.source)[0].get("eval") != "false":
                client.execute_cell(cell, index)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in [Path(p) for p in sys.argv[1:]] or sorted((ROOT / "nbs").glob("*.ipynb")):
        nb_export(path, lib_path=ROOT / "april_nb")
        start = time.time()
        execute(path)
        nbdev_clean(str(path))
        print(f"{path.name}: {time.time() - start:.0f} s", flush=True)
