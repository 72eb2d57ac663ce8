"""Load folders of the `official` layout with the llava package: `run_official.py RESULT`, with a job on stdin.

Run from a folder in which the vision towers' ids are folders. The job has `models` (name -> {folder, and base for a
projector alone}), `prompt` (after the BOS token), `pixels` (.npy), `picture`, `wide` and `folder`, where logits and
weights go by name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from PIL import Image
from safetensors.torch import save_file


def run_model(name: str, model_job: dict[str, str], job: dict[str, Any]) -> dict[str, Any]:
    """Load as a user does, keep the weights, and compute in float32."""
    folder, out = model_job["folder"], Path(job["folder"])
    base = model_job.get("base")
    tokenizer, model, image_processor, _ = load_pretrained_model(folder, base, f"llava-{name}", device="cpu")
    found: dict[str, Any] = {"keys": [], "dtypes": sorted({str(value.dtype) for value in model.parameters()})}
    if base is None:
        _, report = LlavaLlamaForCausalLM.from_pretrained(folder, output_loading_info=True, low_cpu_mem_usage=True)
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        found["keys"] = [f"{kind}: {key}" for kind in kinds for key in sorted(map(str, report[kind]))]
    weights = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
    save_file(weights, out / f"{name}.safetensors")
    model.float().eval()
    for module in model.modules():
        if hasattr(module, "_set_cos_sin_cache"):  # kept in float16 since the model was built under that default
            module._set_cos_sin_cache(module.max_seq_len_cached, "cpu", torch.float32)
    ids = tokenizer_image_token(job["prompt"], tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    with torch.inference_mode():
        logits = model(input_ids=ids, images=torch.from_numpy(np.load(job["pixels"])), use_cache=False).logits[0]
        picture = process_images([Image.open(job["picture"]).convert("RGB")], image_processor, model.config)
        written = model.generate(ids, images=picture.float(), do_sample=False, max_new_tokens=24)[0]
    wide = process_images([Image.open(job["wide"]).convert("RGB")], image_processor, model.config)
    np.save(out / f"{name}.npy", logits.numpy())
    np.save(out / f"{name}-wide.npy", wide.float().numpy())
    return found | {"ids": ids[0].tolist(), "text": tokenizer.decode(written), "generated": written.tolist()}


def main() -> None:
    """Run the job."""
    transformers.logging.set_verbosity_error()
    job = json.load(sys.stdin)
    result = {name: run_model(name, each, job) for name, each in job["models"].items()}
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
