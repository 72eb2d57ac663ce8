"""PEFT adapters that lie beside a whole model: merged where they are asked for, and never left out in silence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from llava_convert.core.errors import InputError, UnsupportedError, UsageError
from llava_convert.layouts.adapter_folder import ADAPTER_CONFIG, adapter_settings
from llava_convert.layouts.naming import sort_tensors
from llava_convert.model.adapter import Adapter, parse_adapter
from llava_convert.model.checkpoint import LLM, PART_NAMES, PARTS, Checkpoint
from llava_convert.model.recipe import Model
from llava_convert.model.tables.names import grouped, layout_table
from llava_convert.storage.sidecars import folder_sidecars
from llava_convert.storage.weights import open_weights

NONE = "none"
_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
# What peft puts before the names of the model that it wraps.
_PREFIX = "base_model.model."


def beside(folder: Path) -> str | None:
    """The adapter file that lies in a folder, None where there is none."""
    return next((name for name in _FILES if (folder / name).is_file()), None)


def with_adapters(checkpoint: Checkpoint, asked: Iterable[str]) -> Checkpoint:
    """The checkpoint with these adapters on top, in order; `none` stands for leaving out those that lie beside it.

    Raises UsageError for `none` among others, InputError where a folder holds no adapter, UnsupportedError (exit 4) for
    tensors that the model has no module for.
    """
    names = list(asked)
    if NONE in names and len(names) > 1:
        raise UsageError("--adapter none stands alone", hint="leave it out, or the adapters")
    for name in names if NONE not in names else ():
        for part, adapter in _opened(Path(name), checkpoint).items():
            own = checkpoint.parts[part]
            # Of a part that the source lacks it is what training left of it; else it is merged, whatever the target.
            made = replace(own, adapter=adapter) if own.state == "absent" else replace(own, merge=(*own.merge, adapter))
            checkpoint = checkpoint.with_part(part, made)
    return checkpoint


def _opened(folder: Path, checkpoint: Checkpoint) -> dict[str, Adapter]:
    """An adapter's parts, under the names of the checkpoint's layout or of a language model alone."""
    if not folder.is_dir() or beside(folder) is None:
        raise InputError(
            f"{folder} holds no adapter ({', '.join(_FILES[1:])})", hint="give the folder of the adapter by --adapter"
        )
    settings = adapter_settings(folder_sidecars(folder))
    found = open_weights(folder, stems=("adapter_model",))
    bare = {name.removeprefix(_PREFIX): tensor for name, tensor in found.tensors.items()}
    tables = [(layout_table(checkpoint.layout), ""), (layout_table("parts"), "llm/")]
    for table, prefix in tables:
        named = {f"{prefix}{name}": tensor for name, tensor in bare.items()}
        if all(table.read(name) is not None or table.dropped(name) is not None for name in named):
            sorted_ = sort_tensors(named, table, folder)
            break
    else:
        raise UnsupportedError(
            f"{folder}: {grouped(bare)}: no module of a {checkpoint.layout} model has these names",
            hint="--adapter none leaves the adapter out",
        )
    adapters: dict[str, Adapter] = {}
    for part in PARTS:
        if tensors := {**sorted_.weights[part], **sorted_.adapters[part]}:
            adapters[part] = parse_adapter(tensors, settings, str(folder))[0]
    return adapters


def refuse_ignored(model: Model, asked: Iterable[str]) -> None:
    """Raise UnsupportedError (exit 4) for an adapter beside weights that are used, of which nobody said what to do."""
    if tuple(asked):
        return
    for part, folder in _folders(model):
        name = beside(folder)
        if name is not None:
            raise UnsupportedError(
                f"{folder}: {name} lies beside a whole {PART_NAMES[part]}, and transformers with peft would load both",
                hint=f"--adapter {folder} merges it, --adapter {NONE} leaves it out",
            )


def ignored_note(checkpoint: Checkpoint) -> str | None:
    """For `inspect`: the adapter that lies beside a whole model."""
    name = beside(checkpoint.root) if checkpoint.parts[LLM].state == "full" and checkpoint.path.is_dir() else None
    if name is None:
        return None
    return f"{name} lies beside the model: --adapter {checkpoint.root} merges it, --adapter {NONE} leaves it out"


def _folders(model: Model) -> Iterable[tuple[str, Path]]:
    """Where whole weights come from: the source's own folder, and those of base models."""
    checkpoint = model.checkpoint
    if checkpoint.parts[LLM].state == "full" and checkpoint.path.is_dir():
        yield LLM, checkpoint.root
    for part, base in model.bases.items():
        if any(r.origin == "base" for r in model.part(part).values()):
            yield part, base.folder
