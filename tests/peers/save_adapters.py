"""Has the real peft put adapters on a LLaVA and save them, in whichever environment runs this.

A job as JSON on stdin (`base`, a transformers LLaVA; `out`; `variants`, which become folders of it) and the logits of
each as JSON in the file that is named: of base and adapter, computed by peft. What was trained is random, so that a
factor or a name that is wrong shows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlavaForConditionalGeneration

TEXT = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
SHORT = ["q_proj", "v_proj"]  # of the tower, too
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": TEXT},
    "short_names": {"target_modules": SHORT},
    "rslora": {"target_modules": TEXT, "use_rslora": True},
    "dora": {"target_modules": TEXT, "use_dora": True},
    "patterns": {
        "target_modules": TEXT,
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "down_proj": 3},
        "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 32, "down_proj": 5},
    },
    "bias_all": {"target_modules": SHORT, "bias": "all"},
    "bias_lora_only": {"target_modules": SHORT, "bias": "lora_only"},
    "saved_modules": {"target_modules": TEXT, "modules_to_save": ["multi_modal_projector", "embed_tokens", "lm_head"]},
    "saved_embedding": {"target_modules": TEXT, "modules_to_save": ["embed_tokens"]},
    "all_linear": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "conv": {"target_modules": ["q_proj", "patch_embedding"]},
    # Releases from 0.15 on.
    "tokens": {"target_modules": TEXT, "trainable_token_indices": {"embed_tokens": [3, 7, 11]}},
}


@torch.inference_mode()
def logits(model: torch.nn.Module, config: Any) -> torch.Tensor:
    """Of a text and a picture that are always the same."""
    torch.manual_seed(1)
    ids = torch.randint(3, 200, (1, 24))
    ids[0, 4:20] = config.image_token_index
    pixels = torch.randn(1, 3, 56, 56)
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 45):
        ids = torch.cat([ids[:, :5], ids[:, 20:]], 1)  # which puts the picture's features where one token is
    found: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits
    return found[0]


def save(base: Path, out: Path, name: str) -> torch.Tensor:
    """Save one variant, of which every trained value is random; returns what it computes."""
    torch.manual_seed(sorted(VARIANTS).index(name))
    model = LlavaForConditionalGeneration.from_pretrained(base, torch_dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **VARIANTS[name]}))
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.1)
    model.save_pretrained(str(out / name))
    return logits(model.eval(), model.config)


if __name__ == "__main__":
    job = json.load(sys.stdin)
    made = {name: save(Path(job["base"]), Path(job["out"]), name).tolist() for name in job["variants"]}
    Path(sys.argv[1]).write_text(json.dumps({"logits": made}))
