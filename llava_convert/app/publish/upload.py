"""Upload a folder, and push what a conversion has just made: prove it, then publish it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

from llava_convert.app.card import CARD
from llava_convert.app.options import BOTH, SourceOptions
from llava_convert.app.publish.contents import names, proven
from llava_convert.app.publish.publish import check, publish
from llava_convert.core.errors import HubError, TransferInterrupted
from llava_convert.core.progress import Reporter, Silence
from llava_convert.engine.report import Published, Report
from llava_convert.model.options import FULL, OFF
from llava_convert.model.record import RECORD
from llava_convert.storage.fingerprints import Digest
from llava_convert.storage.hubs import HUBS, Destination, Parcel


def upload(
    folder: Path,
    to: Destination,
    say: Reporter | None = None,
    *,
    level: str = FULL,
    source: str | Path | None = None,
    options: SourceOptions | None = None,
    include: Collection[str] = (),
    known: Mapping[str, Digest] | None = None,
) -> tuple[Published, ...]:
    """Publish a folder once it is proven to be what was converted. Raises what `proven` and `publish` raise.

    `include` names files that look like secrets and are to be published all the same; `known` are digests of files.
    """
    say = say or Silence()
    names(folder, include)  # a folder that is not there is told before a token that is missing
    check(to)
    files = proven(folder, say, level=level, source=source, options=options, include=include, known=known)
    card = folder / CARD
    if {CARD, RECORD} <= files.keys() and to.repo not in card.read_text(encoding="utf-8"):
        say.note(
            f"the commands in {card} name the folder, not {to.repo}: a conversion with --push names the repository"
        )
    return publish(Parcel(folder, files, to), say)


def pushed(convert: Callable[[], Report], to: Destination, say: Reporter | None = None, *, level: str = FULL) -> Report:
    """Convert, then publish the output. It stays where it is when publishing fails, which raises HubError (exit 8)."""
    check(to)
    made = convert()
    out = Path(made.out)
    try:
        return replace(made, published=upload(out, to, say, level=level, known=made.digests))
    except TransferInterrupted as stop:
        raise TransferInterrupted(f"interrupted; {out} is converted, `{command(out, to, level)}` goes on") from stop
    except HubError as problem:
        raise HubError(
            f"{out} is converted and kept, but not published: {problem.message}",
            hint=f"`{command(out, to, level)}` goes on from here ({problem.hint})",
        ) from problem


def command(folder: Path, to: Destination, level: str = FULL) -> str:
    """The command that uploads a folder to where it is meant to go."""
    words = ["llava-convert", "upload", str(folder), to.repo]
    words += ["--hub", BOTH if to.hubs == tuple(HUBS) else to.hubs[0]]
    words += ["--private"] if to.private else []
    words += ["--revision", to.revision] if to.revision else []
    words += ["--create-pr"] if to.create_pr else []
    words += ["--verify", OFF] if level == OFF else []
    return shlex.join(words)
