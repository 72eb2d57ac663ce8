"""Load folders of the `xtuner` layout by `xtuner chat` itself: `run_xtuner_chat.py RESULT`, with a job on stdin.

The job has `chats` (name -> {llm, llava, visual_encoder or null}), `picture`, `question` and `folder`. The main
function of `xtuner chat` runs as it is, but for what asks for an accelerator and for the user; logits and pixels are
kept on the way.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import CLIPVisionModel
from transformers.generation import GenerationMixin
from xtuner.tools import chat

GENERATE, LOOK = GenerationMixin.generate, CLIPVisionModel.forward


class Witness:
    """Keeps what goes through the tower and the language model of one chat."""

    def __init__(self) -> None:
        self.pixels = self.logits = self.generated = torch.empty(0)

    def look(self, tower: Any, pixels: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.pixels = pixels
        return LOOK(tower, pixels, *args, **kwargs)

    def generate(self, llm: Any, *args: Any, **kwargs: Any) -> Any:
        self.logits = llm(inputs_embeds=kwargs["inputs_embeds"]).logits[0]
        self.generated = GENERATE(llm, *args, **kwargs)
        return self.generated


def run_chat(name: str, each: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """One question about one picture."""
    witness = Witness()
    said: Iterator[str] = iter([job["question"], "EXIT"])
    chat.get_input = lambda: next(said)
    CLIPVisionModel.forward = lambda self, *args, **kwargs: witness.look(self, *args, **kwargs)
    GenerationMixin.generate = lambda self, *args, **kwargs: witness.generate(self, *args, **kwargs)
    sys.argv = ["chat", each["llm"], "--llava", each["llava"], "--image", job["picture"]]
    sys.argv += ["--visual-encoder", each["visual_encoder"]] if each["visual_encoder"] else []
    sys.argv += ["--torch-dtype", "fp32", "--prompt-template", "llama3_chat"]
    sys.argv += ["--temperature", "0", "--max-new-tokens", "24", "--no-streamer"]
    try:
        with torch.inference_mode():
            chat.main()
    except SystemExit as end:
        if end.code:
            raise
    out = Path(job["folder"])
    np.save(out / f"{name}.npy", witness.logits.numpy())
    np.save(out / f"{name}-pixels.npy", witness.pixels.numpy())
    return {"generated": witness.generated[0].tolist()}


def main() -> None:
    """Run the job."""
    target = Path(sys.argv[1])  # chats replace sys.argv
    job = json.load(sys.stdin)
    transformers.logging.set_verbosity_error()
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    chat.exit = sys.exit
    result = {name: run_chat(name, each, job) for name, each in job["chats"].items()}
    target.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
