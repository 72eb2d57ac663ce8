"""`verify --logits --runtime` beside a peer: `run_verify.py RESULT`, with a job on stdin.

The job has `source`, `out`, `runtime` and more keywords of `llava_convert.verify`. RESULT gets what it found as JSON,
or `error`, the sentence and the next step of what it refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import llava_convert


def main() -> None:
    """Run the job."""
    job = json.load(sys.stdin)
    try:
        found = llava_convert.verify(job.pop("source"), job.pop("out"), logits=True, device="cpu", **job)
        result = found.as_json()
    except llava_convert.ConvertError as problem:
        result = {"error": [str(problem), problem.hint]}
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
