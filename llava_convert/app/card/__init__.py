"""The README.md of an output: what it is, how to use it, and how it came to be.

It is read by strangers, on the hub. It holds no path and no time: the same conversion gives the same bytes.
"""

from __future__ import annotations

from llava_convert.app.card.facts import Facts
from llava_convert.app.card.front_matter import front_matter
from llava_convert.app.card.history import history
from llava_convert.app.card.origin import origin
from llava_convert.app.card.quickstarts import filled, quickstarts
from llava_convert.app.card.words import Words

CARD = "README.md"


def card(facts: Facts, *, verified: str) -> str:
    """Markdown with the hub's front matter. `verified` is the level of the check.

    Commands name the hub id that the output is going to have, else the folder: they are for the folder that holds it.
    """
    found = origin(facts)
    return (
        "\n\n".join(
            (
                front_matter(facts, found),
                f"# {facts.title}",
                filled(facts.card.sentence, Words(facts)),
                *quickstarts(facts),
                *history(facts, found, verified),
            )
        )
        + "\n"
    )
