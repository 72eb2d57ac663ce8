"""`llava-convert layouts`: what this version knows."""

from __future__ import annotations

import typer

from llava_convert.cli import _options as opt
from llava_convert.cli._errors import run
from llava_convert.cli._output import Output


def add_to(app: typer.Typer) -> None:
    app.command(
        "layouts",
        help="List the layouts, model families and ops that this version knows.",
        rich_help_panel="Look and check",
    )(_layouts)


def _layouts(as_json: opt.Json = False, quiet: opt.Quiet = False, verbose: opt.Verbose = False) -> None:
    output = Output(as_json, quiet, verbose, "layouts")

    def action() -> None:
        from llava_convert.layouts.info import TARGETS
        from llava_convert.layouts.registry import SOURCES, dialects, family_names
        from llava_convert.model.reshape import relation
        from llava_convert.model.tables.families import architectures
        from llava_convert.ops import OPS

        names = {name: dialects(name) for name in SOURCES}
        families = {a.name: [a.part, *a.model_types] for a in architectures().values()}
        known = [a for a in architectures().values() if a.embedding]
        related = {a.name: [b.name for b in known if a in known and relation(a, b)] for a in architectures().values()}
        output.result(
            {
                "sources": names,
                "targets": list(TARGETS),
                "families": {
                    name: {"part": f[0], "model_types": f[1:], "as": related[name], "called": family_names(f[1])}
                    for name, f in families.items()
                },
                "ops": ["copy", *(op.name for op in OPS)],
            }
        )
        output.line("layouts (source → target)")
        for name in SOURCES:
            targets = ", ".join(t for t in TARGETS if t != name)
            output.line(f"  {name:<10} → {targets:<22} names: {', '.join(names[name])}")
        output.line("families")
        for name, (part, *kinds) in families.items():
            more = f"; --as {', '.join(related[name])}" if related[name] else ""
            output.line(f"  {name:<10} {part:<15} model_type {', '.join(kinds)}{more}")
        output.line("ops")
        for op in OPS:
            output.line(f"  {op.name:<10} {(op.__doc__ or '').splitlines()[0]}")

    raise typer.Exit(run(action, output))
