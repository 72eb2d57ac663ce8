"""What is known of each layout without opening a file: its names, and the options that have an effect there."""

from __future__ import annotations

from dataclasses import dataclass

from llava_convert.core.errors import UsageError


@dataclass(frozen=True)
class LayoutInfo:
    """One layout. `loaders` are programs that read it: their names stand for it, too.

    `writes` are the fields of TargetOptions that shape its output, none for a layout that is not written.
    `takes_config` says that a training config helps to read it. `leaves_out_frozen`: what training left as it was is
    not written, so that a base is of no use.
    """

    name: str
    loaders: tuple[str, ...] = ()
    writes: frozenset[str] = frozenset()
    takes_config: bool = False
    leaves_out_frozen: bool = False


_WEIGHTS = frozenset({"dtype", "max_shard_size", "prompt_template"})
LAYOUTS = {
    info.name: info
    for info in (
        LayoutInfo("pth", takes_config=True),
        LayoutInfo("xtuner", (), _WEIGHTS, takes_config=True, leaves_out_frozen=True),
        LayoutInfo("official", ("llava",), _WEIGHTS | {"image_processor"}),
        LayoutInfo("hf", ("transformers", "vllm"), _WEIGHTS | {"image_processor"}),
        LayoutInfo(
            "gguf",
            ("llama.cpp", "ollama"),
            frozenset({"outtypes", "mmproj_outtypes", "pre", "max_shard_size", "prompt_template"}),
        ),
    )
}
TARGETS = tuple(info.name for info in LAYOUTS.values() if info.writes)


def layout_named(word: str) -> LayoutInfo:
    """The layout of a name, in any case, or of a program that loads it. Raises UsageError."""
    wanted = word.strip().lower()
    for info in LAYOUTS.values():
        if wanted in (info.name, *info.loaders, *(name.replace(".", "") for name in info.loaders)):
            return info
    loaders = ", ".join(
        f"{' or '.join(info.loaders)} for {info.name}" for info in LAYOUTS.values() if info.writes and info.loaders
    )
    raise UsageError(f"--to {word}: no layout has that name", hint=f"one of {', '.join(TARGETS)} ({loaders})")
