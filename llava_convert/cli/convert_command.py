"""`llava-convert LAYOUT SOURCE --to LAYOUT`, a command for each layout, and `convert`, which detects the source's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from llava_convert.cli import _hub_options as hubs
from llava_convert.cli import _options as opt
from llava_convert.cli._errors import run
from llava_convert.cli._output import Output, human_bytes
from llava_convert.layouts.info import LAYOUTS, TARGETS, reading, writing

if TYPE_CHECKING:
    from llava_convert.engine.report import Report


def add_to(app: typer.Typer) -> None:
    for name, info in LAYOUTS.items():
        app.command(name, help=f"{info.help} Convert it to another layout.", rich_help_panel="Convert")(_command(name))
    app.command("convert", help="Convert any of these; the layout is detected.", rich_help_panel="Convert")(
        _command(None)
    )


# The options of a conversion and their defaults, by the keyword that `llava_convert.convert` takes them by.
CONVERT: dict[str, tuple[Any, Any]] = {
    "to": (opt.To, Parameter.empty),
    "llm": (opt.Llm, None),
    "visual_encoder": (opt.VisualEncoder, None),
    "pretrained_pth": (opt.PretrainedPth, None),
    "config": (opt.Config, None),
    "lora_alpha": (opt.LoraAlpha, None),
    "adapter": (opt.Adapter, None),
    "allow_key": (opt.AllowKey, None),
    "dequantize": (opt.Dequantize, False),
    "cache": (opt.Cache, False),
    "out": (opt.Out, None),
    "name": (opt.Name, None),
    "llm_id": (opt.LlmId, None),
    "visual_encoder_id": (opt.VisualEncoderId, None),
    "max_shard_size": (opt.MaxShardSize, None),
    "part": (opt.PartOption, "all"),
    "prompt_template": (opt.PromptTemplate, None),
    "dtype": (opt.Dtype, "auto"),
    "image_processor": (opt.ImageProcessor, None),
    "outtype": (opt.Outtype, None),
    "mmproj_outtype": (opt.MmprojOuttype, None),
    "pre": (opt.Pre, None),
    "as_family": (opt.AsFamily, None),
    "push": (hubs.Push, None),
    "hub": (hubs.PushHub, None),
    "private": (hubs.Private, False),
    "revision": (hubs.Revision, None),
    "create_pr": (hubs.CreatePr, False),
    "verify": (opt.Verify, None),
    "digest": (opt.Digest, False),
    "dry_run": (opt.DryRun, False),
    "force": (opt.Force, False),
    "resume": (opt.Resume, False),
    "threads": (opt.Threads, 0),
}
_TALK: dict[str, tuple[Any, Any]] = {
    "as_json": (opt.Json, False),
    "quiet": (opt.Quiet, False),
    "verbose": (opt.Verbose, False),
}


def options_for(layout: str | None) -> dict[str, tuple[Any, Any]]:
    """The options as a source of a layout can use them; as any can where the layout is to be detected.

    Those that it can never use are hidden: who gives one is told where it belongs. An option that shapes the output of
    some targets alone stands in a panel of theirs.
    """
    found = {}
    for name, (annotation, default) in CONVERT.items():
        kind, told = get_args(annotation)
        told, sources, targets = copy(told), reading(name), writing(name)
        told.hidden = layout is not None and bool(sources) and layout not in sources
        if targets and len(targets) < len(TARGETS):
            told.rich_help_panel = f"Output: {', '.join(targets)}"
        found[name] = (Annotated[kind, told], default)
    return found


def _signed(command: Callable[..., None], options: Mapping[str, tuple[Any, Any]]) -> Callable[..., None]:
    """The function under the signature of these options, which is what typer reads."""
    asked = {"source": (opt.Source, Parameter.empty), **options, **_TALK}
    command.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in asked.items()
        ]
    )
    command.__annotations__ = {name: annotation for name, (annotation, _) in asked.items()}
    return command


def _command(layout: str | None) -> Callable[..., None]:
    def command(source: Path, as_json: bool, quiet: bool, verbose: bool, **given: Any) -> None:
        output = Output(as_json, quiet, verbose)

        def action() -> None:
            from llava_convert.api import convert
            from llava_convert.storage.output.staging import interrupt_on_sigterm

            given["lora_alpha"] = parse_alpha(given.get("lora_alpha"))
            dry_run, push, hub = given["dry_run"], given["push"], given["hub"]
            with interrupt_on_sigterm():
                found = convert(source, source_layout=layout, progress=output, **given)
            output.stop()
            output.fetched(found.fetched)
            if dry_run:
                _print_plan(found, output)
                if push is not None:
                    output.line(f"then published: {push} ({hub or 'huggingface'})")
            else:
                _print_done(found, output)
                hubs.tell(found.published, output)
            output.result(found.as_json())

        raise typer.Exit(run(action, output))

    return _signed(command, options_for(layout))


def parse_alpha(text: str | None) -> dict[str, float]:
    """`16`, or `llm=256,visual-encoder=16`. Raises UsageError."""
    from llava_convert.core.errors import UsageError

    if text is None:
        return {}
    try:
        both = text if "=" in text else f"llm={text},visual-encoder={text}"
        found = {key.strip(): float(value) for key, value in (pair.split("=") for pair in both.split(","))}
    except ValueError:
        found = {"": 0.0}
    if not set(found) <= {"llm", "visual-encoder"} or not all(0 < value < 1e9 for value in found.values()):
        raise UsageError(f"--lora-alpha {text}: it is a number above 0", hint="write 16, or llm=256,visual-encoder=16")
    return found


def _print_plan(found: Report, output: Output) -> None:
    plan = found.plan
    output.line(f"{found.source}: {found.layouts[0]} ({found.why})")
    output.line(f"→ {found.out}: {found.layouts[1]}, {found.dtypes}")
    for part, story in found.parts.items():
        output.line(f"  {part:<15} {story}")
    output.line(f"  {len(plan.tensors)} tensors, {human_bytes(plan.bytes_read)} to read")
    for shard in plan.shards:
        output.line(f"  {shard.name:<40} {len(shard.tensors):>5} tensors  {human_bytes(shard.size):>9}")
    for name in sorted(found.files.keys() - {shard.name for shard in plan.shards}):
        output.line(f"  {name:<40} {'':>13}  {human_bytes(found.files[name]):>9}")
    output.line(f"disk {human_bytes(found.bytes_written)}, memory about {human_bytes(found.memory)}")
    if output.verbose:
        for tensor in plan.tensors:
            ops = " → ".join(op.name for op in tensor.ops) or "copy"
            output.line(f"  {tensor.name}  {tensor.dtype} {list(tensor.shape)}  {ops}  from {tensor.origin}")
    for text in found.notes:
        output.note(text)
    for text in found.warnings:
        output.warn(text)
    output.note("nothing was written (--dry-run)")


def _print_done(found: Report, output: Output) -> None:
    plan = found.plan
    checked = {"quick": "headers and files checked", "full": "every byte checked", "off": "not checked"}
    output.line(
        f"{found.out}: {found.layouts[1]}, {len(plan.tensors)} tensors, {found.dtypes}, "
        f"{human_bytes(found.bytes_written)}, {checked[found.verified]}"
    )
    for part_name, story in found.parts.items():
        output.line(f"  {part_name:<15} {story}")
    if TARGETS[found.layouts[1]].by_file:
        for shard in plan.shards:
            output.line(f"  {shard.name}  {human_bytes(shard.size)}")
    output.note(f"next: {found.next}")
