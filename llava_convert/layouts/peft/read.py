"""Read what peft saves of a LLaVA under training: `adapter_config.json` and `adapter_model.safetensors`, or `.bin`.

peft names modules as the transformers of the training did: 4.37 to 4.51 by the classic names of the hf layout
(`base_model.model.language_model.model.layers…`), later ones by the new ones
(`base_model.model.model.language_model.layers…`), 5.6 and later with a tower without `vision_model.`. All are dialects
of the hf layout's table.
"""

from __future__ import annotations

from llava_convert.layouts.adapter_folder import config_of_run, is_adapter, read_adapter_folder, trained_beside
from llava_convert.layouts.base import Found, OpenOptions
from llava_convert.model.checkpoint import PARTS, Checkpoint, Part, Settings

NAME = "peft"


def detect(found: Found) -> str | None:
    """Asked of every folder: one with whole weights, or with official LLaVA's, is of another layout."""
    if not found.path.is_dir() or not is_adapter(found.names):
        return None
    if any(name.startswith(("model", "pytorch_model", "non_lora_trainables", "mm_projector")) for name in found.names):
        return None
    if "mm_vision_tower" in (found.config or config_of_run(found) or {}):
        return None
    if any(".mm_projector." in name for name in trained_beside(found)):
        return None
    return "it is a PEFT adapter (adapter_config.json)"


def detect_beside(found: Found) -> str | None:
    """Why there is an adapter in a folder, be it beside a whole model; official LLaVA's, which is more, is not one."""
    if found.path.is_dir() and is_adapter(found.names) and "non_lora_trainables.bin" not in found.names:
        return "it holds a PEFT adapter (adapter_config.json)"
    return None


def open(found: Found, options: OpenOptions) -> Checkpoint:
    """Open an adapter folder. Raises what `read_adapter_folder` raises."""
    read = read_adapter_folder(found.path, found.beside, found.headers)
    return Checkpoint(
        layout=NAME,
        path=found.path,
        root=found.path,
        files=read.files,
        beside=found.beside,
        parts={part: Part(adapter=read.adapters.get(part)) for part in PARTS},
        settings=Settings(),
        dropped=read.dropped,
        warnings=read.warnings,
        base=read.base,
        bare=True,
        settled=False,
        whole=False,
    )
