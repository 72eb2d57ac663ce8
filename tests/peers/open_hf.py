"""Open folders of the `hf` layout with this environment's transformers: `open_hf.py RESULT`, with a job on stdin.

The job has `folders` (name -> path). RESULT gets, by name, the rope base that the language model computes with, the
class of the image processor, and the errors of opening processor, tokenizer and model ("" where there is none).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration


def error(open_it: Any, folder: str) -> str:
    """What opening says; any kind of error is a finding here."""
    try:
        open_it(folder)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return ""


def main() -> None:
    """Run the job."""
    transformers.logging.set_verbosity_error()
    found = {}
    for name, folder in json.load(sys.stdin)["folders"].items():
        found[name] = {
            "rope_theta": AutoConfig.from_pretrained(folder).text_config.rope_theta,
            "processor": error(AutoProcessor.from_pretrained, folder),
            "tokenizer": error(AutoTokenizer.from_pretrained, folder),
            "model": error(LlavaForConditionalGeneration.from_pretrained, folder),
        }
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
