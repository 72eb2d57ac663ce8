"""`llava-convert layouts`: what this version knows."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from llava_convert.cli import _options as opt
from llava_convert.cli._errors import run
from llava_convert.cli._output import Output


def made(_name: str) -> opt.Command:
    return _layouts


def _layouts(as_json: opt.Json = False, quiet: opt.Quiet = False, verbose: opt.Verbose = False) -> None:
    output = Output(as_json, quiet, verbose, "layouts")

    def action() -> None:
        from llava_convert.assets.prompts import prompt_templates
        from llava_convert.core.resources import training
        from llava_convert.layouts.info import LAYOUTS, TARGETS
        from llava_convert.layouts.registry import SOURCES, dialects, family_names, outtypes
        from llava_convert.model.reshape import relation
        from llava_convert.model.tables.families import architectures
        from llava_convert.model.tables.quantization import methods
        from llava_convert.ops import OPS

        names = {name: dialects(name) for name in SOURCES}
        families = {a.name: [a.part, *a.model_types] for a in architectures().values()}
        known = [a for a in architectures().values() if a.embedding]
        related = {a.name: [b.name for b in known if a in known and relation(a, b)] for a in architectures().values()}
        recipes = training("listing").listing()
        output.result(
            {
                "sources": names,
                "targets": list(TARGETS),
                "families": {
                    name: {"part": f[0], "model_types": f[1:], "as": related[name], "called": family_names(f[1])}
                    for name, f in families.items()
                },
                "outtypes": list(outtypes()),
                "quantizations": [{"name": m.name, "becomes_floats": bool(m.scales)} for m in methods()],
                "templates": list(prompt_templates()),
                "recipes": [one["name"] for one in recipes],
                "ops": ["copy", *(op.name for op in OPS)],
            }
        )
        _table(
            output,
            "layout, can become, loaded by",
            [
                (name, " ".join(t for t in TARGETS if t != name), " ".join(LAYOUTS[name].loaders) or "-")
                for name in SOURCES
            ],
        )
        _table(
            output,
            "family, part, model_type, --as",
            [
                (name, part.replace("_", " "), " ".join(kinds), " ".join(related[name]) or "-")
                for name, (part, *kinds) in families.items()
            ],
        )
        _table(
            output,
            "--outtype, type of most weights, also called",
            [(name, kind, " ".join(others) or "-") for name, (kind, others) in outtypes().items()],
        )
        _table(
            output,
            "quantised by, can be read as floats",
            [(method.name, "yes" if method.scales else "no") for method in methods()],
        )
        _table(
            output,
            "prompt template, stop words",
            [(name, " ".join(one.stop_words) or "-") for name, one in prompt_templates().items()],
        )
        _table(
            output,
            "recipe, stage, trains, memory",
            [(one["name"], one["stage"], one["trains"], one["memory"]) for one in recipes],
        )
        if output.verbose:
            _table(output, "op, what it does", [(op.name, (op.__doc__ or "").splitlines()[0]) for op in OPS])

    raise typer.Exit(run(action, output))


def _table(output: Output, heads: str, rows: Sequence[Sequence[str]]) -> None:
    """Rows in columns that are as wide as their widest cell, and an empty line."""
    every = [heads.upper().split(", "), *rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(every[0]) - 1)]
    for row in every:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        output.line("  ".join([*cells, row[-1]]))
    output.line("")
