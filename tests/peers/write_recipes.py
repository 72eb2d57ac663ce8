"""Recipes out of xtuner's own LLaVA configs: `write_recipes.py RESULT`, with {"names": [...]} on stdin.

RESULT gets, by name, the text of the recipe (training/recipes); without names, of every LLaVA config that xtuner has.
What xtuner trains in float16 is trained in bfloat16 here.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import xtuner
from mmengine.config import Config
from read_configs import FOLDER, plain

SIZES = {"llama3_70b_instruct": "LLaVA-Llama-3-70B", "llama3_8b_instruct": "LLaVA-Llama-3-8B"}
FAMILIES = {
    "internlm2_chat_1_8b": "LLaVA-InternLM2-1.8B", "internlm2_chat_7b": "LLaVA-InternLM2-7B",
    "internlm2_chat_20b": "LLaVA-InternLM2-20B", "internlm_chat_7b": "LLaVA-InternLM-7B",
    "vicuna_7b_v15": "LLaVA-Vicuna-7B", "vicuna_13b_v15": "LLaVA-Vicuna-13B", "v15_13b": "LLaVA-1.5 13B (Vicuna)",
    "v15_7b": "LLaVA-1.5 7B (Vicuna)", "phi3_mini_4k_instruct": "LLaVA-Phi-3-mini", **SIZES,
}  # fmt: skip
# Where a config names none, xtuner loads the language model in bfloat16 (LLaVAModel._dispatch_lm_model_cfg).
DTYPES = {"torch.float16": "fp16", "torch.float32": "fp32", "torch.bfloat16": "bf16", "None": "bf16"}


def llava_configs() -> list[str]:
    return sorted(path.stem for path in (FOLDER / "llava").rglob("llava_*.py"))


# xtuner's classes of data sets beside that of conversations, as the formats of training/formats.py.
FORMATS = {"RefCOCOJsonDataset": "refcoco", "InvRefCOCOJsonDataset": "refcoco_inverse"}


def sets_of(dataset: Any) -> list[dict[str, Any]]:
    """File, picture folder, class and greatest length of each set, in order."""
    inner = dataset.get("datasets")
    if inner is not None:
        return [one for each in inner for one in sets_of(each)]
    kind, most = plain(dataset["type"]), dataset.get("max_dataset_length")
    return [{"file": dataset["data_path"], "images": dataset["image_folder"], "type": kind, "most": most}]


def lora_of(part: Any) -> dict[str, Any] | None:
    return part and {"r": part["r"], "alpha": part["lora_alpha"], "dropout": part["lora_dropout"]}


def read(config: Any) -> dict[str, Any]:
    """The numbers of a config which a recipe has too."""
    model, wrapper = config.model, config.optim_wrapper
    warm, _ = config.param_scheduler
    return {
        "llm": config.llm_name_or_path,
        "visual_encoder": config.visual_encoder_name_or_path,
        "freeze_llm": model.freeze_llm,
        "freeze_visual_encoder": model.freeze_visual_encoder,
        "llm_lora": lora_of(model.get("llm_lora")),
        "visual_encoder_lora": lora_of(model.get("visual_encoder_lora")),
        "quantized": "quantization_config" in model.llm,
        "llm_dtype": DTYPES[str(model.llm.get("torch_dtype"))],
        "max_length": config.max_length,
        "sets": sets_of(config.train_dataloader.dataset),
        "data_root": config.data_root,
        "batch_size": config.train_dataloader.batch_size,
        "accumulate": wrapper.accumulative_counts,
        "epochs": config.train_cfg.max_epochs,
        "lr": wrapper.optimizer.lr,
        "warmup_ratio": warm.end / config.train_cfg.max_epochs,
        "save_steps": config.default_hooks.checkpoint.interval,
        "keep": config.default_hooks.checkpoint.max_keep_ckpts,
    }


def trained(said: dict[str, Any]) -> str:
    """What of a model is trained, in words."""
    how = []
    if said["llm_lora"]:
        how.append("LoRA on the language model" + (" in 4 bits" if said["quantized"] else ""))
    elif not said["freeze_llm"]:
        how.append("the whole language model")
    if said["visual_encoder_lora"]:
        how.append("LoRA on the tower")
    elif not said["freeze_visual_encoder"]:
        how.append("the whole tower")
    alone = "the projector" + (", the language model in 4 bits" if said["quantized"] else "")
    return ", ".join(how) or alone


def lora(found: dict[str, Any]) -> str:
    return f"{{ r = {found['r']}, alpha = {found['alpha']}, dropout = {found['dropout']} }}"


def number(value: float) -> str:
    return re.sub(r"e-0", "e-", f"{value:.0e}")


def recipe(name: str) -> str:
    """The text of a recipe file."""
    (path,) = FOLDER.rglob(f"{name}.py")
    config = Config.fromfile(str(path))
    said = read(config)
    beginning = next(family for key, family in FAMILIES.items() if name.startswith(f"llava_{key}"))
    stage = 1 if said["freeze_llm"] and not said["llm_lora"] and not config.get("pretrained_pth") else 2
    one_card = "gpu1" in name
    command = f"llava-convert train {name}" if one_card else (
        f"torchrun --nproc-per-node 8 -m llava_convert train {name} --deepspeed deepspeed_zero2 --seed 1024"
    )  # fmt: skip
    root = said["data_root"].removeprefix("./").rstrip("/")
    lines = [
        f"# {beginning}, stage {stage}: {trained(said)}.",
        f"#   {command}",
        f"# Hyper-parameters of the xtuner {xtuner.__version__} config of this name.",
        "",
        "[model]",
        f'llm = "{said["llm"]}"',
        f'visual_encoder = "{said["visual_encoder"]}"',
        f'llm_dtype = "{said["llm_dtype"]}"',
    ]
    if said["quantized"]:
        lines.append('quantization = "nf4"')
    for part in ("llm", "visual_encoder"):
        if not said[f"freeze_{part}"]:
            lines.append(f"freeze_{part} = false")
        if said[f"{part}_lora"]:
            lines.append(f"{part}_lora = {lora(said[f'{part}_lora'])}")
    if config.get("pretrained_pth"):
        first = re.sub(r"/(iter_)?\d+\.pth$", "", config.pretrained_pth.removeprefix("./"))
        lines.append(f'pretrained = "{first}"')
    picture = (336 // 14) ** 2
    (template,) = re.findall(r"^prompt_template = PROMPT_TEMPLATE\.(\w+)", path.read_text(), re.MULTILINE)
    lines += [
        "",
        "[data]",
        f'root = "{root}"',
        f'prompt_template = "{template}"',
        f"max_length = {said['max_length'] + picture}",
        *(["pad_image_to_square = false", 'sampler = "shuffle"'] if stage == 1 else []),
        f"workers = {config.dataloader_num_workers}",
    ]
    for one in said["sets"]:
        file, images = (one[key].removeprefix("./").removeprefix(f"{root}/") for key in ("file", "images"))
        place = "LLaVA-Pretrain" if file.startswith("LLaVA-Pretrain/") else Path(file).stem
        form = FORMATS.get(one["type"])
        place = one["type"].removesuffix("JsonDataset") if form else place
        lines += ["", "[[data.set]]", f'name = "{place}"', f'file = "{file}"', f'images = "{images}"']
        lines += [*([f'format = "{form}"'] if form else []), *([f"max_rows = {one['most']}"] if one["most"] else [])]
    lines += ["", "[train]"]
    train = {key: said[key] for key in ("batch_size", "accumulate", "epochs", "lr")}
    lines += [f"{key} = {number(value) if key == 'lr' else value}" for key, value in train.items()]
    lines += [
        f"warmup_ratio = {said['warmup_ratio']:g}",
        "mmengine_warmup = true",
        f"save_steps = {said['save_steps']}",
        f"keep = {said['keep']}",
    ]
    return "\n".join([*lines, 'dtype = "bf16"']) + "\n"


def main() -> None:
    job = json.load(sys.stdin)
    names = job.get("names") or llava_configs()
    Path(sys.argv[1]).write_text(json.dumps({name: recipe(name) for name in names}))


if __name__ == "__main__":
    main()
