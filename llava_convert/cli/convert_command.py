"""`llava-convert pth|xtuner|official|hf SOURCE --to LAYOUT`, and `convert`, which detects the source."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llava_convert.cli import _hub_options as hubs
from llava_convert.cli import _options as opt
from llava_convert.cli._errors import run
from llava_convert.cli._output import Output, human_bytes

if TYPE_CHECKING:
    from llava_convert.engine.report import Report

# Kept here as words, so that `--help` need not import the layouts.
SOURCES = {
    "pth": "An mmengine .pth of xtuner's training.",
    "xtuner": "The xtuner layout: LLM, projector/, visual_encoder_adapter/.",
    "official": "Official LLaVA (haotian-liu).",
    "hf": "transformers' LlavaForConditionalGeneration.",
    "gguf": "GGUF of llama.cpp: a language model, with or without its mmproj.",
}


def add_to(app: typer.Typer) -> None:
    for name, about in SOURCES.items():
        app.command(name, help=f"{about} Convert it to another layout.", rich_help_panel="Convert")(_command(name))
    app.command("convert", help="Convert any of these; the layout is detected.", rich_help_panel="Convert")(
        _command(None)
    )


def _command(layout: str | None):  # type: ignore[no-untyped-def]  # typer reads the signature of what is returned
    def command(
        source: opt.Source,
        to: opt.To,
        out: opt.Out = None,
        name: opt.Name = None,
        llm: opt.Llm = None,
        visual_encoder: opt.VisualEncoder = None,
        pretrained_pth: opt.PretrainedPth = None,
        config: opt.Config = None,
        lora_alpha: opt.LoraAlpha = None,
        cache: opt.Cache = False,
        llm_id: opt.LlmId = None,
        visual_encoder_id: opt.VisualEncoderId = None,
        dtype: opt.Dtype = "auto",
        max_shard_size: opt.MaxShardSize = None,
        part: opt.PartOption = "all",
        prompt_template: opt.PromptTemplate = None,
        image_processor: opt.ImageProcessor = None,
        outtype: opt.Outtype = None,
        mmproj_outtype: opt.MmprojOuttype = None,
        pre: opt.Pre = None,
        as_family: opt.AsFamily = None,
        dequantize: opt.Dequantize = False,
        push: hubs.Push = None,
        hub: hubs.PushHub = None,
        private: hubs.Private = False,
        revision: hubs.Revision = None,
        create_pr: hubs.CreatePr = False,
        verify: opt.Verify = None,
        digest: opt.Digest = False,
        dry_run: opt.DryRun = False,
        force: opt.Force = False,
        resume: opt.Resume = False,
        threads: opt.Threads = 0,
        as_json: opt.Json = False,
        quiet: opt.Quiet = False,
        verbose: opt.Verbose = False,
    ) -> None:
        output = Output(as_json, quiet, verbose)

        def action() -> None:
            from llava_convert.api import convert
            from llava_convert.storage.output.staging import interrupt_on_sigterm

            with interrupt_on_sigterm():
                found = convert(
                    source,
                    to=to,
                    out=out,
                    name=name,
                    source_layout=layout,
                    config=config,
                    pretrained_pth=pretrained_pth,
                    llm=llm,
                    visual_encoder=visual_encoder,
                    llm_id=llm_id,
                    visual_encoder_id=visual_encoder_id,
                    lora_alpha=parse_alpha(lora_alpha),
                    cache=cache,
                    dtype=dtype,
                    max_shard_size=max_shard_size,
                    part=part,
                    prompt_template=prompt_template,
                    image_processor=image_processor,
                    outtype=outtype,
                    mmproj_outtype=mmproj_outtype,
                    pre=pre,
                    as_family=as_family,
                    dequantize=dequantize,
                    verify=verify,
                    digest=digest,
                    dry_run=dry_run,
                    force=force,
                    resume=resume,
                    threads=threads,
                    push=push,
                    hub=hub,
                    private=private,
                    revision=revision,
                    create_pr=create_pr,
                    say=output,
                )
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

    return command


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
    output.line(f"→ {found.out}: {found.layouts[1]}, {found.dtype}")
    for part, story in found.parts.items():
        output.line(f"  {part:<15} {story}")
    output.line(f"  {len(plan.tensors)} tensors, {human_bytes(plan.bytes_read)} to read")
    for shard in plan.shards:
        output.line(f"  {shard.name:<40} {len(shard.tensors):>5} tensors  {human_bytes(shard.size):>9}")
    for name in sorted((*plan.files, *plan.indexes)):
        output.line(f"  {name}")
    output.line(f"disk {human_bytes(plan.bytes_written)}, memory about {human_bytes(found.memory)}")
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
        f"{found.out}: {found.layouts[1]}, {len(plan.tensors)} tensors, {found.dtype}, "
        f"{human_bytes(plan.bytes_written)}, {checked[found.verified]}"
    )
    for part_name, story in found.parts.items():
        output.line(f"  {part_name:<15} {story}")
    if found.layouts[1] == "gguf":
        for shard in plan.shards:
            output.line(f"  {shard.name}  {human_bytes(shard.size)}")
    output.note(f"next: {_next(found)}")


def _next(found: Report) -> str:
    """What to do with an output first: a command, or a line of Python."""
    plan, layout = found.plan, found.layouts[1]
    held = {tensor.canonical.partition(".")[0] for tensor in plan.tensors}
    if layout == "hf" and isinstance(found.out, Path) and "language_model" in held:
        loads = "AutoModelForImageTextToText" if "projector" in held else "AutoModelForCausalLM"
        return f"from transformers import {loads}; {loads}.from_pretrained({str(found.out)!r})"
    names = [shard.name for shard in plan.shards]
    llm = next((name for name in names if "-mmproj-" not in name), None)
    mmproj = next((name for name in names if "-mmproj-" in name), None)
    if layout == "gguf" and llm is not None:
        sees = f" --mmproj {found.out}/{mmproj}" if mmproj is not None else ""
        return f"llama-server -m {found.out}/{llm}{sees}"
    return shlex.join(["llava-convert", "verify", str(found.source), str(found.out)])
