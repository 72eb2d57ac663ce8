"""Run `xtuner chat` as a card prints it: `run_xtuner_command.py RESULT`, with a job on stdin.

The job has `words`, the command line, and `said`, what a user types. Its main function runs with these very words, but
for what asks for an accelerator and for the user; RESULT gets {"printed": ...}.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import torch
from xtuner.tools import chat


def main() -> None:
    """Run the job."""
    target = Path(sys.argv[1])
    job = json.load(sys.stdin)
    assert job["words"][:2] == ["xtuner", "chat"], job["words"]
    said: Iterator[str] = iter([*job["said"], "EXIT"])
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    chat.get_input = lambda: next(said)
    chat.exit = sys.exit
    sys.argv = job["words"][1:]
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), torch.inference_mode():
            chat.main()
    except SystemExit as end:
        if end.code:
            raise
    target.write_text(json.dumps({"printed": printed.getvalue()}))


if __name__ == "__main__":
    main()
