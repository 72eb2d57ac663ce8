"""One part of a LLaVA in a folder of its own, as transformers keeps it: a language model, a vision tower, a projector.

What `--part` writes, and what a base model on a hub is.
"""

from __future__ import annotations

from llava_convert.core.errors import UnsupportedError
from llava_convert.layouts.base import Found
from llava_convert.layouts.naming import sort_tensors
from llava_convert.model.bases import Base
from llava_convert.model.checkpoint import PART_NAMES, PARTS, PROJECTOR, VISION, Checkpoint, Part, Settings
from llava_convert.model.record import read_record
from llava_convert.model.tables.families import architectures
from llava_convert.model.tables.names import layout_table
from llava_convert.storage.weights import open_weights

NAME = "hf"
# The model types of transformers' LLaVAs, and the dialect of mappings/facts/llava.toml in which each states its facts.
ONEVISION = "llava_onevision"
DIALECTS = {"llava": NAME, "llava_next": "hf.llava_next", ONEVISION: "hf.llava_onevision"}
_WHOLE_CLIP = ("clip", "siglip")  # a tower with the half that reads text
_FILE = "model.safetensors"
_PROJECTOR = "multi_modal_projector."


def part_of(found: Found) -> str | None:
    """Which part a folder holds alone, by its config; a projector, which has none, by its tensors' names."""
    if found.config is not None:
        kind = found.config.get("model_type")
        if kind in _WHOLE_CLIP and "vision_config" in found.config:
            return VISION
        return next((a.part for a in architectures().values() if kind in a.model_types and a.part != PROJECTOR), None)
    if _FILE in found.names and found.path.is_dir():
        names = found.headers.safetensors(found.path / _FILE).tensors
        return PROJECTOR if names and all(name.startswith(_PROJECTOR) for name in names) else None
    return None


def detect_part(found: Found) -> str | None:
    """Why a folder is one part in transformers' form, or None. Asked only where it is no whole model of any layout."""
    part = part_of(found)
    return f"it is a {PART_NAMES[part]} alone" if part is not None else None


def open_part(found: Found, part: str) -> Checkpoint:
    """Open one part. Raises what reading a base model raises; UnsupportedError for tensors of no known name."""
    path = found.path
    parts, extra = {name: Part() for name in PARTS}, None
    if part == PROJECTOR:
        weights = open_weights(found.weights, headers=found.headers)
        sorted_ = sort_tensors(weights.tensors, layout_table(NAME), path)
        parts[part], extra = Part(sorted_.weights[part]), sorted_.extra
        files, dropped, warnings = weights.files, sorted_.dropped, weights.warnings
    else:
        base = Base(part, path, path.name, from_hub=False, files=found.beside, file=found.file)
        parts[part] = Part(base.tensors, None, None, base.config, base.files)
        files, dropped, warnings = base.weights.files, base.dropped, base.weights.warnings
    if not parts[part].weights:
        raise UnsupportedError(f"{path}: it holds no tensor of a {PART_NAMES[part]}")
    return Checkpoint(
        layout=NAME,
        extra=extra,
        path=path,
        root=found.root,
        files=files,
        beside=found.beside,
        parts=parts,
        settings=Settings(),
        dropped=dropped,
        notes=(f"it is a {PART_NAMES[part]} alone, which `--part all` then means",),
        warnings=warnings,
        record=read_record(found.beside),
        default_part=part,
    )
