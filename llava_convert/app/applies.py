"""Options that have no effect on a job: refused by name, with where they have one."""

from __future__ import annotations

from llava_convert.app.extras import ASKED
from llava_convert.app.options import Options
from llava_convert.core.arrays import FP8
from llava_convert.core.errors import UsageError
from llava_convert.core.flags import options_of
from llava_convert.core.tensors import QUANTS
from llava_convert.layouts.info import LAYOUTS, reading, writing
from llava_convert.model.checkpoint import LLM, PART_NAMES, PART_WORDS, VISION, Checkpoint
from llava_convert.model.options import ALL, DROP, part_named
from llava_convert.model.recipe import Model
from llava_convert.model.tables.added import LAYOUT, added_tables


def refuse_for_target(options: Options) -> None:
    """Raise UsageError for an option that has no effect in the target's layout, naming those where it has."""
    for name, option in options_of(Options).items():
        where = writing(name)
        if not where or options.to in where or getattr(options, name) == option.default:
            continue
        instead = "; the types of a GGUF are --outtype and --mmproj-outtype" if name == "dtype" else ""
        raise UsageError(
            f"{option.spelling} does not apply to {options.to}",
            hint=f"leave it out: it is for {', '.join(where)}{instead}",
        )


def refuse_for_source(options: Options, checkpoint: Checkpoint, model: Model) -> None:
    """Raise UsageError for an option that nothing of this source uses."""
    if options.dequantize and not any(tensor.dtype in (*QUANTS, *FP8) for tensor in checkpoint.tensors().values()):
        raise UsageError(
            f"--dequantize does not apply: nothing in {checkpoint.path.name} is quantised",
            hint="leave it out: it is for quantised GGUF files and models in FP8",
        )
    if options.bases.lora_alpha and not any(part.adapters for part in checkpoint.parts.values()):
        raise UsageError(f"--lora-alpha does not apply: {checkpoint.path.name} has no LoRA", hint="leave it out")
    if options.extra == DROP and not any(drop.reason == ASKED for drop in checkpoint.dropped):
        raise UsageError(f"--extra drop does not apply: tables have all of {checkpoint.path.name}", hint="leave it out")
    for flag, given in (("--chat-template", options.chat_template), ("--stop", options.stop)):
        if given is not None and not model.part(LLM):
            raise UsageError(f"{flag} does not apply: no language model is written", hint="leave it out")
    if options.vocab is not None and not model.vocabulary:
        raise UsageError(
            f"--vocab {options.vocab} does not apply: rows and vocabulary of {checkpoint.path.name} agree",
            hint="leave it out",
        )
    for added in added_tables(LAYOUT):
        if (named := added.raw[LAYOUT]) not in (checkpoint.layout, options.to):
            raise UsageError(
                f"--table {added.path} does not apply: it is of the {named} layout, and {checkpoint.path.name} is "
                f"{checkpoint.layout}",
                hint="leave it out",
            )
    for name, option in options_of(Options).items():
        where = reading(name)
        if where and checkpoint.layout not in where and getattr(options, name):
            raise UsageError(
                f"{option.spelling} does not apply: {checkpoint.path.name} is {checkpoint.layout}",
                hint=f"leave it out: it is for {' and '.join(where)} sources",
            )
    for part, named in ((LLM, options.bases.llm), (VISION, options.bases.visual_encoder)):
        # With --part a base of another part is no mistake: it says what the source was trained on.
        used = {layer.asked for layer in checkpoint.layers}
        if named is None or named in used or part in model.bases or part_named(options.part) not in (ALL, part):
            continue
        if not LAYOUTS[options.to].leaves_out_frozen:
            source = checkpoint.path.name
            raise UsageError(
                f"--{PART_WORDS[part]} {named} does not apply: {source} has no use for a {PART_NAMES[part]}",
                hint="leave it out: a base is for a part that the source lacks, or holds as an adapter",
            )
