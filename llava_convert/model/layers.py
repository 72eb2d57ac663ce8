"""A checkpoint laid over the one that it was trained from, whatever the layouts of both.

What a training leaves are adapters and a few whole tensors. The rest is in the checkpoint that it began with: a whole
LLaVA, which may itself have been laid over another. Both are in canonical names by now, so that one rule holds for
xtuner's, official LLaVA's and peft's adapters.
"""

from __future__ import annotations

from dataclasses import replace

from llava_convert.core.errors import UnsupportedError
from llava_convert.core.hub_names import last_name
from llava_convert.core.text import listed
from llava_convert.model.adapter import Adapter
from llava_convert.model.checkpoint import PART_NAMES, PARTS, Checkpoint, Layer, Part
from llava_convert.model.record import merged_already


def laid_over(top: Checkpoint, base: Checkpoint, asked: str) -> Checkpoint:
    """What the source `top` stands for: its base, which it or the user calls `asked`, with what it holds on top.

    Raises UnsupportedError (exit 4) for a base that has the adapter merged in already, or lacks a part of it.
    """
    refuse_second_merge(top, base)
    _refuse_without_part(top, base)
    if top.bare:
        made = replace(base, path=top.path, root=top.root, files=top.files, bare=False)
    else:
        said = top if top.settled else base
        made = replace(
            top,
            settings=said.settings,
            settled=said.settled,
            record=base.record,
            record_of=base.vocabulary_layout,
            whole=base.whole,
        )
    return replace(
        made,
        parts={name: _over(top.parts[name], base.parts[name]) for name in PARTS},
        layers=(*top.layers, Layer("base", asked, base.root, base.files), *base.layers),
        dropped=(*top.dropped, *base.dropped),
        notes=(*top.notes, f"the base model is {last_name(asked)}", *base.notes),
        warnings=(*top.warnings, *base.warnings),
        stubs=tuple(sorted({*top.stubs, *base.stubs})),
        image_newline=top.image_newline or base.image_newline,
        base=None,
    )


def with_adapter(base: Checkpoint, top: Checkpoint, asked: str) -> Checkpoint:
    """The source `base` with an adapter on top, which the user calls `asked`. Raises what `laid_over` raises."""
    refuse_second_merge(top, base)
    _refuse_without_part(top, base)
    return replace(
        base,
        parts={name: _over(top.parts[name], base.parts[name]) for name in PARTS},
        image_newline=top.image_newline or base.image_newline,
        dropped=(*base.dropped, *top.dropped),
        notes=(*base.notes, *top.notes),
        warnings=(*base.warnings, *top.warnings),
        layers=(*base.layers, Layer("adapter", asked, top.root, top.files), *top.layers),
    )


def _over(own: Part, base: Part) -> Part:
    """One part: whole tensors take the place of the base's, adapters come on top of its own."""
    if own.weights:
        return replace(own, config=own.config or base.config, files=own.files or base.files, base=own.base or base.base)
    if base.state == "absent" and own.adapters:
        # Of a part that the base lacks it is what training left of it; else it is merged, whatever the target.
        first, *rest = (*base.merge, *own.adapters)
        return replace(base, adapter=first, merge=tuple(rest), base=own.base or base.base)
    named = base.base if base.state != "absent" else base.base or own.base
    return replace(base, merge=(*base.merge, *own.adapters), base=named)


def refuse_second_merge(top: Checkpoint, base: Checkpoint) -> None:
    """Raise UnsupportedError (exit 4) for a base that is the adapter, or whose conversion.json tells of its merge."""
    below = {*base.files, *(file for layer in base.layers for file in layer.files)}
    if merged_already(base.beside, top.files) or below & set(top.files):
        raise UnsupportedError(
            f"the adapter of {top.path} is already merged into the base {base.path}",
            hint="give the model that it was trained on as the base",
        )


def _refuse_without_part(top: Checkpoint, base: Checkpoint) -> None:
    """Raise UnsupportedError (exit 4) for an adapter of parts that a base, which is one part alone, does not have."""
    if base.default_part not in PARTS or not top.bare:
        return
    counts = {PART_NAMES[name]: sum(map(_trained, top.parts[name].adapters)) for name in PARTS}
    alone = PART_NAMES[base.default_part]
    without = [f"{count} of the {name}" for name, count in counts.items() if count and name != alone]
    if without:
        raise UnsupportedError(
            f"{top.path.name} adapts {sum(counts.values())} modules, but {listed(without)} are not in the base "
            f"{base.path.name}, which is only a {alone}",
            hint="give the LLaVA that it was trained on as the base",
        )


def _trained(adapter: Adapter) -> int:
    """The modules that an adapter changes: by factors, or whole."""
    whole = {name.rpartition(".")[0] for name in adapter.overrides}
    return len(whole | {name.removesuffix(".weight") for name in adapter.modules})
