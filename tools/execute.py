"""Re-executes the chapters in place, cleans them and notes how long each took: `make notebooks`, or
`python tools/execute.py nbs/07_*.ipynb`. The times go to results/times/chapters.csv, which the book shows."""
import csv
import os
import platform
import sys
import time
from pathlib import Path

import nbformat
import torch
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


def note(chapter, seconds):
    """Puts one run into the table of times, in the place of the chapter's last run at the same size."""
    row = {"chapter": chapter, "preset": os.environ.get("APRIL_PRESET", "quick"), "seconds": f"{seconds:.0f}",
           "data": "real" if os.environ.get("APRIL_DATA") else "photographs",
           "threads": str(torch.get_num_threads()), "device": os.environ.get("APRIL_DEVICE", "cpu"),
           "machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version(),
           "torch": torch.__version__, "day": time.strftime("%Y-%m-%d")}
    kept = [r for r in chapters.times() if (r["chapter"], r["preset"]) != (row["chapter"], row["preset"])]
    chapters.TIMES.parent.mkdir(exist_ok=True)
    with open(chapters.TIMES, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(row), lineterminator="\n")
        table.writeheader()
        table.writerows(sorted([*kept, row], key=lambda r: (r["chapter"], r["preset"])))


if __name__ == "__main__":
    chosen = [Path(p) for p in sys.argv[1:]] or sorted((ROOT / "nbs").glob("*.ipynb"))
    for path in sorted(chosen, key=lambda p: p.stem == "33_how_to_run"):   # which shows the times: last
        nb_export(path, lib_path=ROOT / "april_nb")
        start = time.time()
        execute(path)
        nbdev_clean(str(path))
        note(path.stem, time.time() - start)
        print(f"{path.name}: {time.time() - start:.0f} s", flush=True)
