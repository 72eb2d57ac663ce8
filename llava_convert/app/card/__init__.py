"""The README.md of an output: what it is, how to use it, and how it came to be.

It is read by strangers, on the hub. It holds no path and no time: the same conversion gives the same bytes.
"""

from __future__ import annotations

from llava_convert.app.card.facts import Facts
from llava_convert.app.card.front_matter import front_matter
from llava_convert.app.card.history import history
from llava_convert.app.card.origin import origin
from llava_convert.app.card.quickstarts import quickstarts
from llava_convert.engine.plan import Plan
from llava_convert.model.options import TargetOptions
from llava_convert.model.recipe import Model
from llava_convert.model.target import Target


def card(
    plan: Plan,
    target: Target,
    model: Model,
    name: str,
    *,
    options: TargetOptions | None = None,
    repo: str | None = None,
    verified: str,
) -> str:
    """Markdown with the hub's front matter.

    Commands name `repo`, the hub id that the output is going to have (ms://… on ModelScope), else the folder `name`:
    they are for the folder that holds it. `options` are those that the plan was made with, `verified` is the level of
    the check.
    """
    facts = Facts(plan, target, model, name, options or TargetOptions(), repo)
    found = origin(facts)
    return (
        "\n\n".join(
            (
                front_matter(facts, found),
                f"# {facts.title}",
                facts.sentence,
                *quickstarts(facts),
                *history(facts, found, verified),
            )
        )
        + "\n"
    )
