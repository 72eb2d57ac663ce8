"""The README.md of an output: what it is, how to use it, and how it came to be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llava_convert import __version__
from llava_convert.checkpoint import LLM, PROJECTOR, VISION
from llava_convert.hub import is_id
from llava_convert.model import Model
from llava_convert.ops import MergeLora
from llava_convert.plan import Plan, Target
from llava_convert.shards import PlannedTensor
from llava_convert.spec import TORCH_NAMES

_WHAT = {
    "xtuner": "an xtuner LLaVA (LLM, projector, and what was trained of the vision tower)",
    "official": "a LLaVA in the official layout (haotian-liu/LLaVA)",
    "hf": "a LLaVA for transformers (`LlavaForConditionalGeneration`)",
    "gguf": "a LLaVA as GGUF, for llama.cpp and Ollama: a language model, and an mmproj with its eyes",
}


_PARTS = {
    LLM: ("the language model of a LLaVA, on its own", "text-generation"),
    VISION: ("the vision tower of a LLaVA, on its own", "image-feature-extraction"),
    PROJECTOR: ("the projector of a LLaVA, on its own", "image-text-to-text"),
}


def card(plan: Plan, target: Target, model: Model, name: str, *, verified: str) -> str:
    """Markdown with the hub's front matter. Holds no path and no time."""
    what, tag, library = _what(plan)
    front = ["---", f"pipeline_tag: {tag}", f"library_name: {library}"]
    bases = sorted({i for part in (LLM, VISION) if (i := _base_id(plan, part)) is not None})
    if bases:
        front += ["base_model:", *(f"- {base}" for base in bases)]
    front += ["tags:", "- llava", "---"]
    body = [f"# {name}", "", f"This is {what}.", "", *_use(plan, name), "## How it was made", ""]
    body += _made(plan, model, verified)
    body += [*_remarks(plan, target, model)]
    return "\n".join([*front, "", *body]) + "\n"


def _what(plan: Plan) -> tuple[str, str, str]:
    """What the output is, its pipeline tag, and the library that reads it."""
    library = {"hf": "transformers", "xtuner": "xtuner", "gguf": "gguf"}.get(plan.layout, "llava")
    parts = {tensor.canonical.partition(".")[0] for tensor in plan.tensors}
    if len(parts) > 1 or plan.layout == "xtuner":
        return _WHAT[plan.layout], "image-text-to-text", library
    part = next(iter(parts))
    return *_PARTS[part], library if part == PROJECTOR or plan.layout == "gguf" else "transformers"


def _base_id(plan: Plan, part: str) -> str | None:
    """The id that a written config names for a part's base; only ids, never folder names."""
    adapter = "llm_adapter" if part == LLM else "visual_encoder_adapter"
    places = {
        LLM: [("config.json", "text_config", "_name_or_path"), ("config.json", None, "_name_or_path")],
        VISION: [
            ("config.json", "vision_config", "_name_or_path"),
            ("config.json", None, "mm_vision_tower"),
            ("visual_encoder/config.json", None, "_name_or_path"),
        ],
    }[part]
    for file, section, key in [*places, (f"{adapter}/adapter_config.json", None, "base_model_name_or_path")]:
        config: dict[str, Any] = json.loads(plan.files.get(file, b"{}"))
        name = (config.get(section) or {}).get(key) if section else config.get(key)
        if isinstance(name, str) and is_id(name):
            return name
    return None


def _use(plan: Plan, name: str) -> list[str]:
    if plan.layout == "hf" and "processor_config.json" in plan.files:
        return [
            "```python",
            "from PIL import Image",
            "from transformers import AutoProcessor, LlavaForConditionalGeneration",
            "",
            f'processor = AutoProcessor.from_pretrained("{name}")',
            f'model = LlavaForConditionalGeneration.from_pretrained("{name}", torch_dtype="auto")',
            'messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]',
            "prompt = processor.apply_chat_template(messages, add_generation_prompt=True)",
            'inputs = processor(images=Image.open("picture.jpg"), text=prompt, return_tensors="pt")',
            "inputs = inputs.to(model.device, model.dtype)",
            "print(processor.decode(model.generate(**inputs, max_new_tokens=128)[0]))",
            "```",
            "",
        ]
    if plan.layout == "official" and "config.json" in plan.files:
        return [
            "The loader of the `llava` package picks its class by the folder's name, which must contain `llava`:",
            "",
            "```python",
            "from llava.model.builder import load_pretrained_model",
            "",
            f'load_pretrained_model("{name}", None, "llava_{name}")',
            "```",
            "",
        ]
    if plan.layout == "gguf":
        return _use_gguf(plan, name)
    if plan.layout == "xtuner":
        return [
            "```shell",
            f"xtuner chat {name} --visual-encoder VISUAL_ENCODER --llava {name} \\",
            "  --prompt-template TEMPLATE --image FILE",
            "```",
            "",
        ]
    return []


def _use_gguf(plan: Plan, name: str) -> list[str]:
    """The files, the commands for each runtime, and what llama.cpp computes otherwise than the model was trained."""
    rows = [(shard.name, _types_in(shard.tensors), _human(shard.size)) for shard in plan.shards]
    table = ["| file | types | size |", "|---|---|---|", *(f"| `{a}` | {b} | {c} |" for a, b, c in rows), ""]
    llm = next((file for file, _, _ in rows if "-mmproj-" not in file), None)
    mmproj = next((file for file, _, _ in rows if "-mmproj-" in file), None)
    if llm is None:
        return table
    if mmproj is None:
        return [*table, "```shell", f'llama-cli -m {llm} -p "Hello"', "```", ""]
    recipe = next(file for file in sorted(plan.files) if file.endswith(".Modelfile"))
    return [
        *table,
        "With llama.cpp:",
        "",
        "```shell",
        f'llama-mtmd-cli -m {llm} --mmproj {mmproj} --image picture.jpg -p "What is this?"',
        f"llama-server -m {llm} --mmproj {mmproj}",
        "```",
        "",
        "With Ollama (the prompt, the stop words and both files are in the Modelfile):",
        "",
        "```shell",
        f"ollama create {name} -f {recipe}",
        f'ollama run {name} "What is this? ./picture.jpg"',
        "```",
        "",
        "**A known defect of the runtime.** llama.cpp (October 2026; ggml-org/llama.cpp#25814) puts the tower's class "
        "token behind the patches, although the model was trained with it in front: every patch gets "
        "its neighbour's position, the first is lost, and the class token's features go to the language model. "
        "Answers about pictures are therefore worse than those of the same model in transformers, by how much depends "
        "on the model. No content of a file can mend that for runtimes with and without the defect; these files hold "
        "the layout that is right for a repaired one, and every layer of the tower.",
        "",
        "llama.cpp pads pictures to squares, as LLaVA's training does.",
        "",
    ]


def _human(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _types_in(tensors: Sequence[PlannedTensor]) -> str:
    found = sorted({t.dtype for t in tensors})
    return ", ".join(found)


def _made(plan: Plan, model: Model, verified: str) -> list[str]:
    dtypes = sorted({TORCH_NAMES.get(t.dtype, t.dtype) for t in plan.tensors})
    merged = sum(any(isinstance(op, MergeLora) for op in t.ops) for t in plan.tensors)
    copied = sum(not t.ops for t in plan.tensors)
    how = {"quick": "headers and files", "full": "every byte, recomputed from the source", "off": "not at all"}
    rows = [
        ("made by", f"llava-convert {__version__}"),
        ("from", f"the {model.checkpoint.layout} layout"),
        ("tensors", f"{len(plan.tensors)}: {copied} copied byte for byte, {merged} with LoRA merged in"),
        ("dtype", ", ".join(dtypes)),
        ("checked", how[verified]),
    ]
    table = ["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows), ""]
    return [*table, "`conversion.json` tells for each tensor where its bytes come from.", ""]


def _remarks(plan: Plan, target: Target, model: Model) -> list[str]:
    said: list[str] = []
    added = target.added_rows
    if added is not None and added["rows"]["to"] > added["rows"]["from"]:
        said.append(
            f"Rows {added['rows']['from']} to {added['rows']['to'] - 1} of the vocabulary were added for "
            "`<image>`, `<pad>` and padding: each is the mean of the old rows, and means nothing."
        )
    processor = plan.files.get("preprocessor_config.json")
    if plan.layout == "hf" and processor is not None and b'"CLIPImageProcessor"' in processor:
        said.append(
            "Training padded pictures to squares. The image processor here crops their middle, since that loads "
            "in every transformers version; on pictures that are not square the model sees other pixels. "
            "`--image-processor llava` pads."
        )
    said += [note[0].upper() + note[1:] + "." for note in (*model.checkpoint.notes, *model.notes)]
    said += [warning[0].upper() + warning[1:] + "." for warning in model.warnings if "/" not in warning]
    return [line for text in said for line in (f"- {text}",)]
