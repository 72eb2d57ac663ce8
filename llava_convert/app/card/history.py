"""How an output was made, and what was checked of it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from llava_convert._version import __version__
from llava_convert.app.card.facts import Facts
from llava_convert.app.card.origin import Origin
from llava_convert.app.card.tables import size, table
from llava_convert.core.tensors import TORCH_NAMES
from llava_convert.engine.shards import PlannedTensor
from llava_convert.model.checkpoint import LLM, PART_NAMES, PARTS, VISION
from llava_convert.ops.join import every
from llava_convert.ops.lora import MergeLora
from llava_convert.ops.quantize import Dequantize, Quantize

_LEVELS = {
    "quick": "After writing, the output was compared with the plan: names, dtypes, shapes and offsets of all tensors, "
    "the index and the small files (`--verify quick`).",
    "full": "After writing, every byte was read back. Copied tensors were compared with the source, and all others "
    "were computed a second time (`--verify full`).",
    "off": "Nothing was checked after writing (`--verify off`).",
}


def history(facts: Facts, origin: Origin, verified: str) -> list[str]:
    """The paragraphs from "How it was made" on."""
    return [
        "## How it was made",
        _made(facts, origin),
        _parts(facts),
        "`conversion.json` lists each tensor, the source of its bytes and the operations on them.",
        "## What was checked",
        _LEVELS[verified],
        _checks(facts),
        "To compare every tensor with your copy of the source, bit for bit:",
        f"```shell\nllava-convert verify SOURCE {shlex.quote(facts.folder)}\n```",
        *_license(origin),
        *_remarks(facts),
    ]


def _made(facts: Facts, origin: Origin) -> str:
    source = f" [{origin.source}](https://huggingface.co/{origin.source})," if origin.source else ""
    said = f"llava-convert {__version__} made this from{source} {facts.source.description}."
    bases = [
        f"{PART_NAMES[part]} [{name}](https://huggingface.co/{name})"
        for part in (LLM, VISION)
        if (name := facts.base_id(part)) is not None
    ]
    return said + (f" Base models: {', '.join(bases)}." if bases else "")


def _parts(facts: Facts) -> str:
    """One row a part; where the files have a table, that tells types and sizes."""
    columns = 3 if facts.kind.by_file else 5
    rows = []
    for part in PARTS:
        mine = {t.canonical: t for t in facts.plan.tensors if t.canonical.startswith(f"{part}.")}
        tensors = list(mine.values())
        if not tensors:
            rows.append((PART_NAMES[part], _elsewhere(facts, part), "", "", ""))
            continue
        dtypes = ", ".join(sorted({TORCH_NAMES.get(t.dtype, t.dtype) for t in tensors}))
        cells = (str(len(tensors)), dtypes, size(sum(t.nbytes for t in tensors)))
        rows.append((PART_NAMES[part], _weights(facts, part, tensors), *cells))
    head = ("part", "weights from", "tensors", "dtype", "size")
    return table(head[:columns], (row[:columns] for row in rows))


def _elsewhere(facts: Facts, part: str) -> str:
    name = facts.base_id(part)
    return (
        f"not in this output, use the base model{f' `{name}`' if name else ''}" if facts.whole else "not in this output"
    )


def _weights(facts: Facts, part: str, tensors: Sequence[PlannedTensor]) -> str:
    name = facts.base_id(part)
    base = f"the base model{f' `{name}`' if name else ''}"
    if any(".lora_" in t.canonical for t in tensors):
        return f"a trained LoRA adapter for {base}"
    words = {
        "checkpoint": "the converted checkpoint",
        "base": base,
        "stage 1": "the stage-1 checkpoint",
    }
    origins = sorted({t.origin for t in tensors if t.origin != "synthetic"})
    said = " and ".join(words.get(o, o) for o in origins) or "generated"
    merged = sum(_merged(t) for t in tensors)
    return f"{said}, with a trained LoRA merged into {merged} tensors" if merged else said


def _merged(tensor: PlannedTensor) -> bool:
    return any(isinstance(op, MergeLora) for op in every(tensor.ops))


def _kind(tensor: PlannedTensor) -> str:
    """What was done to a tensor: the one thing that changes its values most."""
    if tensor.origin == "synthetic":
        return "generated, because no source has them; LLaVA never reads them"
    if any(isinstance(op, Quantize) for op in every(tensor.ops)):
        return "quantised"
    if _merged(tensor):
        return "LoRA merged in float64, rounded once"
    if any(isinstance(op, Dequantize) for op in every(tensor.ops)):
        return "dequantised"
    if tensor.is_copy:
        return "copied bit for bit"
    if any(op.name == "cast" for op in every(tensor.ops)):
        if tensor.source.dtype in ("F16", "BF16") and tensor.dtype == "F32":
            return "widened to float32, exactly"
        return f"cast to {TORCH_NAMES.get(tensor.dtype, tensor.dtype)}, rounded to nearest"
    return "same values, in another order or with rows added"


def _checks(facts: Facts) -> str:
    counts: dict[str, int] = {}
    for tensor in facts.plan.tensors:
        kind = _kind(tensor)
        counts[kind] = counts.get(kind, 0) + 1
    rows = [(kind, str(count)) for kind, count in sorted(counts.items())]
    rows.append((f"all, in {_files(len(facts.plan.shards))}", str(len(facts.plan.tensors))))
    added = facts.target.added_rows
    if added is not None and added["rows"]["to"] > added["rows"]["from"]:
        rows.append(("added to the vocabulary", f"{added['rows']['to'] - added['rows']['from']} rows"))
    return table(("what was done", "tensors"), rows)


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _license(origin: Origin) -> list[str]:
    if origin.license is None:
        return []
    shown = f"[{origin.license.id}]({origin.license.link})" if origin.license.link else f"`{origin.license.id}`"
    return [
        "## License",
        f"{shown}: {origin.license.where}. The vision tower and the training data have licenses of their own.",
    ]


def _remarks(facts: Facts) -> list[str]:
    said: list[str] = []
    added = facts.target.added_rows
    if added is not None and added["rows"]["to"] > added["rows"]["from"]:
        said.append(
            f"Rows {added['rows']['from']} to {added['rows']['to'] - 1} of the vocabulary were added for `<image>`, "
            "`<pad>` and padding. Each new row is the mean of the old rows. These rows were not trained."
        )
    processor = facts.plan.files.get("preprocessor_config.json")
    crops = processor is not None and b'"CLIPImageProcessor"' in processor
    if facts.whole and crops and not facts.kind.pads_pictures:
        said.append(
            "Training padded pictures to squares. The image processor of this output crops them to their centre, "
            "because every transformers version can load such a processor. If a picture is not square, the model "
            "sees other pixels than in training. A conversion with `--image-processor llava` pads."
        )
    notes = (*facts.model.checkpoint.notes, *facts.model.notes)
    # A warning with a slash in it may name a path of this machine.
    notes += tuple(warning for warning in facts.model.warnings if "/" not in warning)
    # How many tensors LoRA was merged into, the table of parts tells.
    said += [note[0].upper() + note[1:] + "." for note in notes if not note.startswith("merged LoRA into ")]
    return ["## Remarks", "\n".join(f"- {text}" for text in said)] if said else []
