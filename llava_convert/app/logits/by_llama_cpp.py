"""GGUF in llama.cpp's server by xllamacpp, with its own template and reader of pictures (mtmd).

The server shows probabilities where it chooses a token, and nothing of the tower or the projector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llava_convert.app.ask.llama_cpp_runtime import LlamaCppRuntime
from llava_convert.app.ask.load import llama_cpp
from llava_convert.app.ask.runtimes import LLAMA_CPP, Answer
from llava_convert.app.logits.probes import Probe
from llava_convert.app.logits.shown import ANSWER, Shown
from llava_convert.core.values import dataclass
from llava_convert.model.checkpoint import Checkpoint

_MOST = 4096  # tokens whose probabilities are asked for, at each of the answer's positions
_LOWEST = -1e30  # llama.cpp's word for the logarithm of a probability that float32 has not


@dataclass(frozen=True)
class ByLlamaCpp:
    """Shows the answer and the logits that it was chosen by."""

    runtime: LlamaCppRuntime
    name: str = LLAMA_CPP
    blind: str = "tower, projector, layers, and the logits of the prompt"
    answers_only: bool = True

    def show(self, probe: Probe, rendered: str, then: Sequence[int] = ()) -> Shown:
        import torch

        found = self.runtime.completion(probe.messages, probe.pictures, ANSWER, logprobs=True, top_logprobs=_MOST)
        choice, places = found["choices"][0], found["choices"][0]["logprobs"]["content"]
        rows = 1 + max((one["id"] for place in places for one in place["top_logprobs"]), default=0)
        logits = torch.full((len(places), rows), math.nan)
        for i, place in enumerate(places):
            for one in place["top_logprobs"]:
                if one["logprob"] > _LOWEST:
                    logits[i, one["id"]] = one["logprob"]
        ids = tuple(int(place["id"]) for place in places)
        text = (choice["message"]["content"] or "").strip()
        answer = Answer(text, len(ids), choice.get("finish_reason") == "stop", ids)
        return Shown(int(found["usage"]["prompt_tokens"]), logits, answer)


def load(checkpoint: Checkpoint, device: Any, visual_encoder: str | None) -> ByLlamaCpp:
    """Raises UsageError without xllamacpp, UnsupportedError where it does not load the file."""
    return ByLlamaCpp(llama_cpp(checkpoint, gpu=device.type != "cpu", exact=True))
