"""`llava-convert verify SOURCE OUT`: are the weights the same?"""

from __future__ import annotations

from llava_convert.app.jobs.look import VerifyJob
from llava_convert.cli._options import Command, command
from llava_convert.cli._output import Output
from llava_convert.core import heap


def made(name: str) -> Command:
    return command(name, VerifyJob, _verify)


def _verify(job: VerifyJob, output: Output) -> None:
    heap.share()
    verdict = job.run(output)
    output.stop()
    output.result(verdict.as_json())
    for note in verdict.notes:
        output.warn(note)
    if output.verbose:
        for name, gap in sorted(verdict.different.items()):
            how = f"in {gap.elements} elements, by at most {gap.largest:.3g}" if gap.shapes is None else "in shape"
            output.line(f"  differs: {name} {how}")
        for name, gap in sorted(verdict.rounded.items()):
            output.line(f"  rounded differently: {name} in {gap.elements} elements, by at most {gap.largest:.3g}")
        for name, reason in verdict.harmless.items():
            output.line(f"  differs without effect: {name} ({reason})")
        for what in verdict.not_compared:
            output.line(f"  not compared: {what}")
    if verdict.logits is not None:
        for site in verdict.logits.sites if job.layers else ():
            mark = "" if site.relative <= verdict.logits.bound else "  beyond rounding"
            output.line(f"  {site.name:<28} {site.largest:9.3g}  {site.relative:8.2g} of the largest{mark}")
        for one in verdict.logits.said if output.verbose else ():
            output.line(
                f"  {one.probe}: {one.source!r}, {one.out!r}, KL {one.kl:.2g}, first choices {one.top1:.1%} equal"
            )
    verdict.refuse(strict=job.strict)
    output.line(verdict.sentence())
