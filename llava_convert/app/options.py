"""Everything that a conversion can be told, and whether it applies to the job."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_convert.core.errors import UsageError
from llava_convert.core.tensors import FROM_TORCH_NAMES, QUANTS
from llava_convert.engine.check import QUICK
from llava_convert.layouts.info import LAYOUTS, reading, writing
from llava_convert.model.checkpoint import LLM, PART_NAMES, PART_WORDS, VISION, Checkpoint
from llava_convert.model.options import ALL, TargetOptions, part_named
from llava_convert.model.recipe import Bases, Model

# What people call the dtypes: torch's names, those of its shorthands, and those of trainers' flags.
_DTYPES = {
    "float16": ("fp16", "f16", "half"),
    "bfloat16": ("bf16",),
    "float32": ("fp32", "f32", "float", "full"),
}
# Options that TargetOptions holds under another name.
_FIELDS = {"outtype": "outtypes", "mmproj_outtype": "mmproj_outtypes"}


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How to read a source. None means that the source says it itself.

    `allow_key` are keys of configs that no table knows and that may be left behind. `adapter`: the
    folders of PEFT adapters to merge, in order, or "none" to leave out those that lie beside the model.
    """

    source_layout: str | None = None
    config: Path | None = None
    pretrained_pth: Path | None = None
    dequantize: bool = False
    bases: Bases = field(default_factory=Bases)
    allow_key: tuple[str, ...] = ()
    adapter: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions):
    """Everything that a conversion can be told. None means the default, which depends on source and target.

    `to` is a layout's name; `asked` is the word that stood for it, where that was another. `repo` is what the output is
    going to be called on a hub (ms://… on ModelScope): its card's commands name that. `shared` says that the options
    are those of several jobs: one that has no effect on this job is then no error.
    """

    to: str
    out: Path | None = None
    name: str | None = None
    target: TargetOptions = field(default_factory=TargetOptions)
    verify: str = QUICK
    digest: bool = False
    force: bool = False
    resume: bool = False
    threads: int = 0
    repo: str | None = None
    asked: str | None = None
    shared: bool = False

    @classmethod
    def of(cls, source: SourceOptions, to: str, **more: Any) -> Options:
        """The options of a conversion of what `source` reads."""
        return cls(**vars(source), to=to, **more)


def dtype_named(word: str) -> str | None:
    """torch's name of a dtype that may be called otherwise (fp16, half, torch.float16); None for `auto`.

    Raises UsageError.
    """
    name = str(word).lower().removeprefix("torch.")
    if name == "auto":
        return None
    found = next((dtype for dtype, others in _DTYPES.items() if name in (dtype, *others)), name)
    if found not in FROM_TORCH_NAMES:
        raise UsageError(f"--dtype {word}: it is one of auto, {', '.join(_DTYPES)}")
    return found


def flag_of(option: str) -> str:
    """What the command line calls an option."""
    return "--" + option.replace("_", "-")


def refuse_for_target(options: Options) -> None:
    """Raise UsageError for an option that has no effect in the target's layout, naming those where it has."""
    plain = TargetOptions()
    shaping = frozenset().union(*(info.writes for info in LAYOUTS.values()))
    for name in sorted(shaping - LAYOUTS[options.to].writes):
        field_name = _FIELDS.get(name, name)
        if getattr(options.target, field_name) == getattr(plain, field_name):
            continue
        instead = "; the types of a GGUF are --outtype and --mmproj-outtype" if name == "dtype" else ""
        raise UsageError(
            f"{flag_of(name)} does not apply to {options.to}",
            hint=f"leave it out: it is for {', '.join(writing(name))}{instead}",
        )


def refuse_for_source(options: Options, checkpoint: Checkpoint, model: Model) -> None:
    """Raise UsageError for an option that nothing of this source uses."""
    for name in ("config", "pretrained_pth"):
        if getattr(options, name) is not None and name not in LAYOUTS[checkpoint.layout].reads:
            raise UsageError(
                f"{flag_of(name)} does not apply: {checkpoint.path.name} is {checkpoint.layout}",
                hint=f"leave it out: it is for sources of {' and '.join(reading(name))}",
            )
    if options.dequantize and not any(tensor.dtype in QUANTS for tensor in checkpoint.tensors().values()):
        raise UsageError(
            f"--dequantize does not apply: nothing in {checkpoint.path.name} is quantised",
            hint="leave it out: it is for quantised GGUF files",
        )
    if options.bases.lora_alpha and not any(part.adapter or part.merge for part in checkpoint.parts.values()):
        raise UsageError(f"--lora-alpha does not apply: {checkpoint.path.name} has no LoRA", hint="leave it out")
    for part, named in ((LLM, options.bases.llm), (VISION, options.bases.visual_encoder)):
        # With --part a base of another part is no mistake: it says what the source was trained on.
        if named is None or part in model.bases or part_named(options.target.part) not in (ALL, part):
            continue
        if not LAYOUTS[options.to].leaves_out_frozen:
            source = checkpoint.path.name
            raise UsageError(
                f"--{PART_WORDS[part]} {named} does not apply: {source} has no use for a {PART_NAMES[part]}",
                hint="leave it out: a base is for a part that the source lacks, or holds as an adapter",
            )
