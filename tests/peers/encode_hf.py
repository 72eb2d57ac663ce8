"""Encode texts with this environment's transformers: `encode_hf.py RESULT`, with a job on stdin.

The job has `folder`, a tokenizer's, and `texts`. RESULT gets JSON: `ids`, nothing added to what the text gives.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer


def main() -> None:
    """Run the job."""
    job = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in job["texts"]]
    Path(sys.argv[1]).write_text(json.dumps({"ids": ids}))


if __name__ == "__main__":
    main()
