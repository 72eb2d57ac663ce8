"""`llava-convert LAYOUT SOURCE --to LAYOUT`, a command for each layout; `convert`, which detects it; and `merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_convert.app.jobs.convert import ConvertJob, MergeJob
from llava_convert.cli._options import Command, command
from llava_convert.cli._output import Output
from llava_convert.core import heap
from llava_convert.core.flags import options_of
from llava_convert.core.text import human_bytes
from llava_convert.layouts.info import LAYOUTS, TARGETS, reading

if TYPE_CHECKING:
    from llava_convert.engine.report import Report


def made(name: str) -> Command:
    if name == "merge":
        return command("merge", MergeJob, _convert)
    if name not in LAYOUTS:
        return command("convert", ConvertJob, _convert)
    unused = [o for o in options_of(ConvertJob) if reading(o) and name not in reading(o)]
    return command("convert", ConvertJob, _convert, hidden=unused, source_layout=name)


def _convert(job: ConvertJob, output: Output) -> None:
    heap.share()
    found = job.run(output)
    output.stop()
    output.fetched(found.fetched)
    if job.dry_run:
        _print_plan(found, output)
        if job.push is not None:
            output.line(f"then published: {job.push} ({', '.join(job.hubs)})")
    else:
        _print_done(found, output)
        output.published(found.published)
    output.result(found.as_json())


def _print_plan(found: Report, output: Output) -> None:
    plan = found.plan
    output.line(f"{found.source}: {found.layouts[0]} ({found.why})")
    output.line(f"→ {found.out}: {found.layouts[1]}, {found.dtypes}")
    for part, story in found.parts.items():
        output.line(f"  {part:<15} {story}")
    output.line(f"  {len(plan.tensors)} tensors, {human_bytes(plan.bytes_read)} to read")
    for shard in plan.shards:
        mine = "  in this share" if found.share is not None and shard.name in found.share else ""
        output.line(f"  {shard.name:<40} {len(shard.tensors):>5} tensors  {human_bytes(shard.size):>9}{mine}")
    for name in sorted(found.files.keys() - {shard.name for shard in plan.shards}):
        output.line(f"  {name:<40} {'':>13}  {human_bytes(found.files[name]):>9}")
    free = "" if found.disk_free is None else f" of {human_bytes(found.disk_free)} free"
    took = "" if found.seconds is None else f", time about {_about(found.seconds)}"
    output.line(f"disk {human_bytes(found.bytes_written)}{free}, memory about {human_bytes(found.memory)}{took}")
    if found.disk_free is not None and found.disk_free < found.bytes_written:
        output.warn("the disk is too small for it: make room, or choose another place with -o")
    if output.verbose:
        for tensor in plan.tensors:
            ops = " → ".join(op.name for op in tensor.ops) or "copy"
            output.line(f"  {tensor.name}  {tensor.dtype} {list(tensor.shape)}  {ops}  from {tensor.origin}")
    for text in found.notes:
        output.note(text)
    for text in found.warnings:
        output.warn(text)
    output.note("nothing was written (--dry-run)")


def _about(seconds: float) -> str:
    """An estimate as people say it."""
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{round(seconds / 60)} min"


def _print_done(found: Report, output: Output) -> None:
    plan = found.plan
    checked = {"quick": "headers and files checked", "full": "every byte checked", "off": "not checked"}
    if found.share is not None:
        sizes = sum(found.files[name] for name in found.share)
        output.line(
            f"{found.out}: {len(found.share)} of {len(plan.shards)} files, {human_bytes(sizes)}, "
            f"{checked[found.verified]}"
        )
        output.note("next, once every share is written: the same command with --finish in place of --files")
        return
    output.line(
        f"{found.out}: {found.layouts[1]}, {len(plan.tensors)} tensors, {found.dtypes}, "
        f"{human_bytes(found.bytes_written)}, {checked[found.verified]}"
    )
    for part_name, story in found.parts.items():
        output.line(f"  {part_name:<15} {story}")
    if TARGETS[found.layouts[1]].by_file:
        for shard in plan.shards:
            output.line(f"  {shard.name}  {human_bytes(shard.size)}")
    output.note(f"next{', in Python' if found.next.startswith('from ') else ''}: {found.next}")
