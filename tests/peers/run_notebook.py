"""Run cells in a notebook's kernel and say what each shows.

Run with the environment's Python: `.venvs/notebook/bin/python tests/peers/run_notebook.py RESULT < JOB`. A job has
`cells`, and `widgets`: whether ipywidgets is there. The result has each cell's outputs, as a notebook keeps them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

# As if it were not installed: importlib.util.find_spec finds nothing then.
_HIDDEN = "import sys\nsys.modules['ipywidgets'] = None"


def main() -> None:
    job = json.load(sys.stdin)
    cells = [*([] if job["widgets"] else [_HIDDEN]), *job["cells"]]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [cell["outputs"] for cell in notebook["cells"]][-len(job["cells"]) :]
    Path(sys.argv[1]).write_text(json.dumps(outputs))


if __name__ == "__main__":
    main()
