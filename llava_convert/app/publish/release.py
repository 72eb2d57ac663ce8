"""A release: the layouts of one model, each in a repository of its own, named as xtuner's releases are.

The names are those of the layouts' entries (`layouts/info.py`). Everything is planned before anything is done; then
each row is converted with full verification and published, one after the other. What a rerun finds done it leaves: an
output whose record is the one that the conversion would write now, and whose files have the recorded sha256; and on the
hubs the files that are there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any, ClassVar

from llava_convert.app import convert as engine
from llava_convert.app.documents import Documents
from llava_convert.app.jobs.publish import ReleaseJob
from llava_convert.app.options import Options
from llava_convert.app.planning import Prepared, is_already, prepare
from llava_convert.app.publish.contents import names, proven
from llava_convert.app.publish.publish import check, publish
from llava_convert.app.session import job_session
from llava_convert.app.source import open_source
from llava_convert.app.stage_one import stage_one
from llava_convert.core.errors import ConvertError, HubError, MismatchError, OutputError, UsageError
from llava_convert.core.progress import Reporter, Silence
from llava_convert.core.values import dataclass
from llava_convert.engine.report import Published
from llava_convert.layouts.info import LAYOUTS, TARGETS, writing
from llava_convert.model.checkpoint import Checkpoint
from llava_convert.model.options import FULL
from llava_convert.model.record import read_record
from llava_convert.storage.hubs import Parcel
from llava_convert.storage.remote.mounts import mounted
from llava_convert.storage.remote.session import Session
from llava_convert.storage.sidecars import folder_sidecars


@dataclass(frozen=True)
class Row:
    """One layout of a release: `word` is what --only takes; files and card are named NAME + `title`."""

    word: str
    suffix: str
    layout: str
    title: str
    stage_one: bool = False


# As https://huggingface.co/xtuner publishes llava-llama-3-8b-v1_1.
ROWS = (
    *(
        Row(name, target.repo_suffix, name, "" if target.plain_names else target.repo_suffix)
        for name, target in TARGETS.items()
        if not target.by_training and not target.adapters_alone
    ),
    *(
        Row("pretrain", "-pretrain", name, "-pretrain", stage_one=True)
        for name, target in TARGETS.items()
        if LAYOUTS[name].leaves_out_frozen
        and not target.by_training  # so that a projector alone is what a pretraining leaves
    ),
)


class _OneOfSeveral(Options):
    """The options of one layout, which were given for all."""

    shared: ClassVar[bool] = True


@dataclass(frozen=True)
class ReleaseItem:
    """One layout of a release, with its folder and repository; `made` is None if the source has this layout already."""

    row: Row
    repo: str
    folder: Path
    source: Path
    options: Options
    made: Documents | None = None
    there: bool = False  # converted by an earlier run
    published: tuple[Published, ...] = field(default=())

    @property
    def size(self) -> int:
        return sum(self._sizes.values())

    @property
    def files(self) -> list[str]:
        return sorted(self._sizes)

    @property
    def _sizes(self) -> dict[str, int]:
        if self.made is None:
            return {name: (self.folder / name).stat().st_size for name in names(self.folder)}
        return {**self.made.plan.sizes, **self.made.sizes}

    @property
    def _tensors(self) -> dict[str, int]:
        """How many tensors each file holds, where the conversion is planned."""
        return {} if self.made is None else {shard.name: len(shard.tensors) for shard in self.made.plan.shards}

    @property
    def story(self) -> str:
        return "as it is" if self.made is None else "there already" if self.there else "convert"

    def as_json(self) -> dict[str, Any]:
        return {
            "layout": self.row.layout,
            "repo": self.repo,
            "out": str(self.folder),
            "conversion": self.story,
            "files": [
                {"name": name, "bytes": size, "tensors": self._tensors.get(name)}
                for name, size in sorted(self._sizes.items())
            ],
            "bytes": self.size,
            "published": [one.as_json() for one in self.published],
        }


def plan(release: ReleaseJob) -> list[ReleaseItem]:
    """What a release does, read from headers; writes nothing and asks no hub.

    Raises UsageError for an unknown layout or name, and what hinders a layout, with the command that leaves it out.
    """
    with job_session(release) as session:
        return _plan(release, session)


def _plan(release: ReleaseJob, session: Session) -> list[ReleaseItem]:
    check_name(release.name)
    rows = _rows(release.layouts)
    opened = open_source(release.source, release, session)
    items = []
    for row in rows:
        try:
            item = _item(release, row, opened, session)
        except ConvertError as problem:
            others = ",".join(other.word for other in rows if other != row)
            hints = [problem.hint, f"--only {others} leaves it out" if others else None]
            raise type(problem)(
                f"the release's {row.word} layout cannot be made: {problem.message}",
                hint="; ".join(filter(None, hints)) or None,
            ) from problem
        if item is not None:
            items.append(item)
    return items


def check_name(name: str) -> None:
    org, _, last = name.partition("/")
    if not org or not last or "/" in last:
        raise UsageError(f"--name {name}: a release is named ORG/NAME", hint="for instance me/llava-llama-3-8b")


def _rows(only: Sequence[str]) -> list[Row]:
    known = {row.word: row for row in ROWS}
    unknown = [word for word in only if word not in known]
    if unknown:
        raise UsageError(f"--only {','.join(unknown)}: a release has {', '.join(known)}")
    return [row for row in ROWS if not only or row.word in only]


def _item(release: ReleaseJob, row: Row, opened: tuple[Checkpoint, str], session: Session) -> ReleaseItem | None:
    """The item of a row; None for the stage-1 projector where there was no stage 1 and nobody asked for it."""
    base = release.name.partition("/")[2]
    options: Options = _OneOfSeveral.of(
        release,
        row.layout,
        out=Path(release.out or base) / (base + row.suffix),
        name=base + row.title,
        outtype=release.outtype if row.layout in writing("outtype") else None,
        push=release.name + row.suffix,
        hub=release.hub,
        private=release.private,
    )
    source = opened[0].path
    if row.stage_one:
        first = stage_one(opened[0], options.pretrained_pth, session)
        if first is None:
            if release.only:
                raise UsageError("there is no stage-1 checkpoint", hint="--pretrained-pth PATH names it")
            return None
        # What is told of the later stage does not hold of the first.
        source = first
        options = replace(options, config=None, pretrained_pth=None, lora_alpha=None, part="projector")
    elif is_already(opened[0], options):
        if not source.is_dir():
            raise UsageError(f"{source} is of this layout, and a folder is published", hint="give its folder")
        if (remote := mounted(source)) is not None:
            raise UsageError(f"{remote.address} is of this layout, and is not here", hint="--cache fetches it")
        return ReleaseItem(row, release.name + row.suffix, source, source, options)
    ready = prepare(source, options, session, None if row.stage_one else opened)
    made = engine.documents(ready, options)
    there = _is_there(ready, made)
    if ready.out.exists() and not there:
        raise OutputError(
            f"{ready.out} exists, and is not what this release makes of {source.name}",
            hint="remove it, or give another folder by -o",
        )
    return ReleaseItem(row, release.name + row.suffix, ready.out, source, options, made, there)


def _is_there(ready: Prepared, made: Documents) -> bool:
    """Whether an output is what the conversion would make, by its record alone."""
    try:
        found = read_record(folder_sidecars(ready.out))
    except ConvertError:
        return False
    verified = (found or {}).get("verified")
    if found is None or not isinstance(verified, dict) or verified.get("level") != FULL:
        return False
    # The record names plan, options and the identity of every source, and nothing that two runs could differ in.
    return bool(found == json.loads(made.record.dump(files=verified.get("files"))))


def run_release(release: ReleaseJob, say: Reporter | None = None) -> list[ReleaseItem]:
    """Convert and publish every layout. Raises what converting and publishing raise; a rerun continues."""
    with job_session(release) as session:  # of a remote source, for all its conversions
        return _run(release, _plan(release, session), say or Silence())


def _run(release: ReleaseJob, items: list[ReleaseItem], say: Reporter) -> list[ReleaseItem]:
    for item in items:
        check(release.destination(item.repo))
    done: list[ReleaseItem] = []
    for item in items:
        say.note(f"{item.repo}: {item.row.layout}, {item.story}")
        try:
            done.append(_do(item, release, say))
        except HubError as problem:
            raise HubError(f"{item.repo} is not published: {problem.message}", hint=problem.hint) from problem
    return done


def _do(item: ReleaseItem, release: ReleaseJob, say: Reporter) -> ReleaseItem:
    options, files = item.options, None
    if item.there:
        try:
            files = proven(item.folder, say)
        except MismatchError as problem:
            say.note(f"{problem.message}: it is converted again")
            options = replace(options, force=True)
    if files is None:
        made = None if item.made is None else engine.convert(item.source, options, say)
        files = proven(item.folder, say, known=None if made is None else made.digests)
    to = release.destination(item.repo)
    return replace(item, published=publish(Parcel(item.folder, files, to), say))
