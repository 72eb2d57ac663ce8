"""Has llava-torch's own train.py train a LLaVA for two steps, and its own loader say what came of it.

A job as JSON on stdin: `base` (a language model, or a whole LLaVA), `tower`, `out`, `options` of train.py, and `lora`,
whether the loader is to lay `out` over `base`. The result has the logits of the loaded model, in float32, of `ids`
(the image's token is -200) and the pixels that are always the same.
"""

from __future__ import annotations

import json
import random
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch
from llava.model.builder import load_pretrained_model
from llava.train import train as script
from PIL import Image

STEPS = 2


def _without_deepspeed() -> None:
    """The savers of train.py import DeepSpeed to ask whether a parameter is one of ZeRO-3: here none is."""
    for name in ("deepspeed", "deepspeed.zero", "deepspeed.runtime", "deepspeed.runtime.zero"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    states = ModuleType("deepspeed.runtime.zero.partition_parameters")
    states.ZeroParamStatus = None  # type: ignore[attr-defined]
    sys.modules[states.__name__] = states
    sys.modules["deepspeed"].zero = sys.modules["deepspeed.zero"]  # type: ignore[attr-defined]


def _data(folder: Path) -> Path:
    source = random.Random(5)
    rows = []
    for index in range(4):
        Image.frombytes("RGB", (56, 56), source.randbytes(3 * 56 * 56)).save(folder / f"{index}.png")
        talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a cat and a table"}]
        rows.append({"image": f"{index}.png", "conversations": talk})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def main() -> None:
    result, job = Path(sys.argv[1]), json.load(sys.stdin)
    out = Path(job["out"])
    options = {
        "model_name_or_path": job["base"],
        "vision_tower": job["tower"],
        "version": "plain",
        "data_path": _data(out.parent),
        "image_folder": out.parent,
        "image_aspect_ratio": "pad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "output_dir": out,
        "max_steps": STEPS,
        "save_steps": 1,
        "per_device_train_batch_size": 1,
        "learning_rate": 0.02,
        "model_max_length": 256,
        "report_to": "none",
        "use_cpu": True,
        **job["options"],
    }
    sys.argv = ["train.py", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    _without_deepspeed()
    script.train()
    # Which kind of folder it is the loader knows by this name alone.
    name = "llava-lora-tiny" if job["lora"] else "llava-tiny"
    model = load_pretrained_model(str(out), job["base"] if job["lora"] else job.get("over"), name, device="cpu")[1]
    model.float().eval()
    for module in model.modules():
        if hasattr(module, "_set_cos_sin_cache"):  # kept in float16 since the model was built under that default
            module._set_cos_sin_cache(module.max_seq_len_cached, "cpu", torch.float32)
    torch.manual_seed(1)
    pixels = torch.randn(1, 3, 56, 56)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([job["ids"]]), images=pixels, use_cache=False).logits[0]
    result.write_text(json.dumps({"logits": logits.tolist()}))


if __name__ == "__main__":
    main()
