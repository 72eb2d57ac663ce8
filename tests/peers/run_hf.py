"""Load folders of the `hf` layout with this environment's transformers: `run_hf.py RESULT`, with a job on stdin.

The job has `models`, `projectors` and `image_processors` (name -> folder; the last run on the picture `wide`),
`prompts` (name -> ids before and after the picture), `pixels` and `features` (.npy), `picture`, `question`, and
`folder` for arrays. RESULT gets JSON: what each model missed, its dtype, its rope frequencies, what its processor makes
of the question, what it generates.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoModel, AutoProcessor, LlavaForConditionalGeneration

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
# Before, one image token stands for all features, and the processor does not know how many they are.
EXPANDS = VERSION >= (4, 46)


def _keys(report: dict[str, Any]) -> list[str]:
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return [f"{kind}: {key}" for kind in kinds for key in sorted(map(str, report[kind]))]


def _inv_freq(model: torch.nn.Module) -> list[float]:
    found = [module.inv_freq for name, module in model.named_modules() if name.endswith("rotary_emb")]
    return [float(value) for value in found[0]]


def _ids(job: dict[str, Any], name: str, model: Any) -> torch.Tensor:
    before, after = job["prompts"][name]
    count = model.config.image_seq_length if EXPANDS else 1
    return torch.tensor([[*before, *[model.config.image_token_index] * count, *after]])


def run_model(name: str, folder: str, job: dict[str, Any]) -> dict[str, Any]:
    """Everything asked about one model."""
    model, report = LlavaForConditionalGeneration.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    pixels = torch.from_numpy(np.load(job["pixels"]))
    ids = _ids(job, name, model)
    with torch.inference_mode():
        logits = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[0]
    np.save(Path(job["folder"], f"{name}.npy"), logits.numpy())
    found: dict[str, Any] = {
        "keys": _keys(report),
        "inv_freq": _inv_freq(model),
        "eos": model.generation_config.eos_token_id,
        "auto_dtypes": sorted(
            {
                str(parameter.dtype)
                for parameter in LlavaForConditionalGeneration.from_pretrained(folder, torch_dtype="auto").parameters()
            }
        ),
    }
    given = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    if EXPANDS:
        processor = AutoProcessor.from_pretrained(folder)
        picture = Image.open(job["picture"]).convert("RGB")
        content = [{"type": "image"}, {"type": "text", "text": job["question"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        given = dict(processor(text=text, images=picture, return_tensors="pt"))
        found |= {
            "input_ids": given["input_ids"][0].tolist(),
            "wanted_ids": ids[0].tolist(),
            "bos": model.generation_config.bos_token_id,
        }
    with torch.inference_mode():
        written = model.generate(**given, do_sample=False, max_new_tokens=24, pad_token_id=model.config.pad_token_id)
    found["generated"] = written[0, given["input_ids"].shape[1] :].tolist()
    if EXPANDS:
        found["text"] = processor.decode(found["generated"])
    return found


def run_projector(name: str, folder: str, job: dict[str, Any]) -> dict[str, Any]:
    """The projector by the code in its own folder."""
    model, report = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    features = torch.from_numpy(np.load(job["features"]))
    with torch.inference_mode():
        np.save(Path(job["folder"], f"{name}-projector.npy"), model(features).numpy())
    return {"keys": _keys(report), "class": type(model).__name__}


def run_image_processor(name: str, folder: str, job: dict[str, Any]) -> str:
    """What a processor makes of a picture that is not square; returns its class."""
    processor = AutoProcessor.from_pretrained(folder).image_processor
    pixels = processor(Image.open(job["wide"]).convert("RGB"), return_tensors="np")["pixel_values"]
    np.save(Path(job["folder"], f"{name}-wide.npy"), pixels)
    return type(processor).__name__


def main() -> None:
    """Run the job."""
    transformers.logging.set_verbosity_error()
    job = json.load(sys.stdin)
    result = {
        "version": transformers.__version__,
        "models": {name: run_model(name, folder, job) for name, folder in job["models"].items()},
        "image_processors": {n: run_image_processor(n, folder, job) for n, folder in job["image_processors"].items()},
        "projectors": {name: run_projector(name, folder, job) for name, folder in job["projectors"].items()},
    }
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
