"""Run `xtuner mmbench` itself: `run_xtuner_mmbench.py RESULT`, with a job on stdin.

The job has `words`, its command line after `mmbench`. Its main function runs as it is, but for what asks for an
accelerator, and for control characters in answers, at which openpyxl would end it: they are left out. RESULT gets
{"rows": the rows of mmbench_result.xlsx, "scores": mmbench_result.json or null}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas
import torch
import transformers
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE, Cell
from xtuner.tools import mmbench


def main() -> None:
    """Run the job."""
    target = Path(sys.argv[1])
    job = json.load(sys.stdin)
    transformers.logging.set_verbosity_error()
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    check = Cell.check_string
    Cell.check_string = lambda self, value: check(self, ILLEGAL_CHARACTERS_RE.sub("", value))
    sys.argv = ["mmbench", *job["words"]]
    with torch.inference_mode():
        mmbench.main()
    work = Path(job["words"][job["words"].index("--work-dir") + 1])
    (made,) = work.iterdir()  # it puts a folder named by the time there
    table = pandas.read_excel(made / "mmbench_result.xlsx", keep_default_na=False)
    scores = made / "mmbench_result.json"
    result = {
        "rows": json.loads(table.to_json(orient="records", force_ascii=False)),
        "columns": list(table.columns),
        "scores": json.loads(scores.read_text(encoding="utf-8")) if scores.is_file() else None,
    }
    target.write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
