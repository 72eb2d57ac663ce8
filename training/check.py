"""Whether the data of a recipe are what training takes, before it starts, and how to get what is missing.

Rows, pictures and what is left out of them are found by the functions that training uses.
"""

from __future__ import annotations

import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_convert.core.errors import ConvertError, InputError

from .conversations import (
    CUT,
    Conversation,
    Draws,
    Encoder,
    Listings,
    conversations,
    left_out_words,
    read_picture,
    require_pictures,
    require_samples,
    template_of,
)
from .recipe import Recipe
from .sources import advice, expected

_AT_ONCE = 64  # pictures that wait for a thread
_SHOWN = 5  # of the pictures that cannot be read


@dataclass(frozen=True)
class SetCheck:
    """What was found of one set.

    `rows` are all of the file, `kept` those that are trained on, `pictures` those of them that see a picture;
    `left_out` counts the rest by reason; `taken` are those of an epoch, which a set may draw (`drawn`) or repeat.
    `missing` are pictures that do not exist, by folder; `broken` those that cannot be read, with why, where they were
    opened. `problem` is what training would refuse the set for. Where the file itself is missing, `absent` are the
    folders of pictures that it will ask for and that do not exist either.
    """

    name: str
    file: Path
    root: Path
    rows: int = 0
    kept: int = 0
    pictures: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    opened: bool = False
    counted_cuts: bool = False
    problem: str = ""
    hint: str | None = None
    absent: tuple[str, ...] = ()
    taken: int = 0
    drawn: bool = False

    @property
    def sound(self) -> bool:
        return not self.problem

    def lines(self) -> Iterator[str]:
        if self.rows:
            yield f"{self.name}: {self.rows:,} rows, {self.kept:,} to train on, {self._pictures()}"
            yield from (f"  {line}" for line in left_out_words(self.left_out))
            if self.drawn:
                yield f"  drawn from them: {self.taken:,}, by train.seed"
            if not self.counted_cuts:
                yield f"  not counted: {CUT}, since the tokenizer of model.llm is not on this machine"
        if self.problem:
            yield f"{self.name}: {self.problem}"
            if not self.file.exists():
                yield from advice(str(self.file), self.root)
            elif self.hint:
                yield f"    {self.hint}"
        for folder, count in self.missing.items():
            yield f"  {folder}: {count:,} missing"
            yield from advice(folder, self.root)
        for picture, why in list(self.broken.items())[:_SHOWN]:
            yield f"  {picture}: {why}"
        if len(self.broken) > _SHOWN:
            yield f"  and {len(self.broken) - _SHOWN:,} more that cannot be read"
        for folder in self.absent:
            yield f"  {folder}: no such folder, or nothing in it"
            yield from advice(folder, self.root)

    def _pictures(self) -> str:
        about = f"{self.pictures:,} about a picture"
        if gone := sum(self.missing.values()):
            return f"{about}, {gone:,} pictures missing"
        if not self.opened:
            return f"{about}, all pictures there (--open reads them)"
        unread = len(self.broken)
        return f"{about}, " + (f"{unread:,} pictures cannot be read" if unread else "all pictures can be read")

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "file": str(self.file),
            "rows": self.rows,
            "kept": self.kept,
            "pictures": self.pictures,
            "left_out": self.left_out,
            "missing": self.missing,
            "broken": self.broken,
            "problem": self.problem,
            "absent": list(self.absent),
        }


def check(recipe: Recipe, encoder: Encoder | None = None, *, open_pictures: bool = False) -> list[SetCheck]:
    """Look at every row and every picture that a recipe names, those of its evaluation too.

    With an `encoder` rows that are cut before their answer are counted. With `open_pictures` every picture is decoded,
    several at once.
    """
    root = Path(recipe.data.root)
    template = template_of(recipe.data.prompt_template)
    skip = recipe.data.on_bad_image == "skip"
    listings = Listings()
    found = []
    draws = Draws(recipe.train.seed), Draws(recipe.train.seed)  # training reads either as data of its own
    for one, drawn in (*((s, draws[0]) for s in recipe.data.sets), *((s, draws[1]) for s in recipe.eval.sets)):
        file, images = root / one.file, root / one.images
        left_out: Counter[str] = Counter()
        missing: dict[str, str] = {}
        present: dict[Path, None] = {}
        rows = pictures = gone = 0
        places: list[int] = []
        try:
            for conversation in conversations(file, template, one.format):
                rows += 1
                if encoder is not None and is_cut(conversation, encoder):
                    left_out[CUT] += 1
                    continue
                left_out.update(conversation.left_out)
                if conversation.turns:
                    places.append(rows - 1)
                if conversation.sees and (name := conversation.row.image):
                    pictures += 1
                    if where := listings.missing_from(images, name):
                        gone += 1
                        missing[name] = where
                    elif open_pictures:
                        present[images / name] = None
        except ConvertError as problem:
            absent = [str(place) for place in expected(file, images) if not listings.files(str(place))]
            hint = problem.hint
            found.append(SetCheck(one.name, file, root, problem=problem.message, hint=hint, absent=tuple(absent)))
            continue
        taken = drawn.taken(one, places, rows)
        broken = unreadable(present)
        none_left = bool(present) and len(broken) == len(present)
        trouble = _refused(file, images, len(taken), list(missing), gone == pictures, broken, none_left, skip=skip)
        found.append(
            SetCheck(
                one.name,
                file,
                root,
                rows,
                len(places),
                pictures,
                dict(left_out),
                dict(Counter(missing.values()).most_common()),
                broken,
                open_pictures,
                encoder is not None,
                trouble,
                taken=len(taken),
                drawn=bool(one.max_rows),
            )
        )
    return found


def _refused(
    file: Path,
    images: Path,
    kept: int,
    missing: list[str],
    all_missing: bool,
    broken: dict[str, str],
    all_broken: bool,
    *,
    skip: bool,
) -> str:
    """What training would refuse a set for; empty where it takes it."""
    try:
        require_samples(kept, file)
        require_pictures(file, images, missing, all_missing, skip=skip)
    except InputError as problem:
        return problem.message
    if broken and (all_broken or not skip):
        return f"{file}: {len(broken):,} pictures cannot be read, for instance {next(iter(broken))}"
    return ""


def is_cut(conversation: Conversation, encoder: Encoder) -> bool:
    """Whether `max_length` cuts a row before its answer. Only rows that are long enough for that are tokenised."""
    if not conversation.turns:
        return False
    before = 0
    for turn in conversation.turns:
        before += len(turn.asked.encode())
        if turn.answer or encoder.template.suffix or not encoder.template.suffix_is_eos:
            break
    # A token is half a byte of text at the least: no normaliser makes text twice as long.
    if before < encoder.max_length // 2:
        return False
    ((_, learnt),) = encoder([conversation.turns])
    return not any(learnt)


def unreadable(pictures: Iterable[Path]) -> dict[str, str]:
    """Decode pictures, several at once; those that cannot be read, with why."""
    found: dict[str, str] = {}
    waiting: deque[tuple[Path, Future[Any]]] = deque()

    def look(picture: Path) -> None:
        read_picture(picture).close()

    def next_done() -> None:
        picture, future = waiting.popleft()
        problem = future.exception()
        if isinstance(problem, OSError | ValueError):
            found[str(picture)] = str(problem)
        elif problem is not None:
            raise problem

    # Threads: Pillow's decoders let each other run.
    with ThreadPoolExecutor() as pool:
        for picture in pictures:
            waiting.append((picture, pool.submit(look, picture)))
            if len(waiting) == _AT_ONCE:
                next_done()
        while waiting:
            next_done()
    return found


def fix_ocrvqa(folder: Path) -> tuple[int, int]:
    """Give every picture of OCR-VQA a copy that ends in `.jpg`, as the data sets name them; the originals stay.

    Returns how many were copied and how many were there. A copy appears whole or not at all. Raises InputError where
    there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", hint="it is the one with OCR-VQA's pictures: …/ocr_vqa/images")
    copied = there = 0
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix == ".jpg" or path.name.startswith("."):
            continue
        target = path.with_suffix(".jpg")
        if target.exists():
            there += 1
            continue
        partial = target.with_name(f".{target.name}.partial")
        shutil.copyfile(path, partial)
        partial.replace(target)
        copied += 1
    return copied, there
