"""Ask a folder of the `official` layout about pictures with the llava package: `ask_official.py RESULT`, job on stdin.

Run from a folder in which the vision tower's id is a folder. The job has `folder`, and `questions`: pairs of a
picture's path and a prompt with `<image>`, after the BOS token. RESULT gets {"answers": [...]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from PIL import Image


def main() -> None:
    """Answer greedily, computing in float32."""
    transformers.logging.set_verbosity_error()
    job = json.load(sys.stdin)
    tokenizer, model, image_processor, _ = load_pretrained_model(job["folder"], None, "llava-llama", device="cpu")
    model.float().eval()
    for module in model.modules():
        if hasattr(module, "_set_cos_sin_cache"):  # kept in float16 since the model was built under that default
            module._set_cos_sin_cache(module.max_seq_len_cached, "cpu", torch.float32)
    answers = []
    for picture, prompt in job["questions"]:
        ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
        pixels = process_images([Image.open(picture).convert("RGB")], image_processor, model.config).float()
        with torch.inference_mode():
            written = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=12)[0]
        answers.append(tokenizer.decode(written, skip_special_tokens=True).strip())
    Path(sys.argv[1]).write_text(json.dumps({"answers": answers}))


if __name__ == "__main__":
    main()
