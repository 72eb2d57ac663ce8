"""Examine a folder for a consumer; repair its small files, all at once, and keep the folder that was."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_convert.app.doctor.folder import Folder
from llava_convert.app.doctor.rules import CONSUMERS, NEWEST, OLDEST, RULES, TRANSFORMERS, VLLM, Rule
from llava_convert.core.errors import InputError, MismatchError, OutputError, UsageError, not_a_choice
from llava_convert.core.progress import Reporter
from llava_convert.core.values import dataclass
from llava_convert.layouts.base import OpenOptions
from llava_convert.layouts.info import layout_named
from llava_convert.layouts.registry import recognise
from llava_convert.model.checkpoint import PART_NAMES, Checkpoint
from llava_convert.model.options import ALL
from llava_convert.storage.output.staging import exchange

if TYPE_CHECKING:
    from llava_convert.app.jobs.look import DoctorJob

BACKUP = ".before-doctor"


@dataclass(frozen=True)
class Trouble:
    """One thing that a consumer trips over. `hint` is what else mends it, where `fixable` is false."""

    rule: str
    what: str
    source: str
    fixable: bool
    fixed: bool
    hint: str

    def as_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class Diagnosis:
    """The problems that were found; true if none is left. `backup` is the folder as it was, if one was fixed."""

    folder: str
    layout: str
    consumer: str
    troubles: tuple[Trouble, ...]
    changed: tuple[str, ...] = ()
    backup: str | None = None

    @property
    def left(self) -> tuple[Trouble, ...]:
        return tuple(trouble for trouble in self.troubles if not trouble.fixed)

    def __bool__(self) -> bool:
        return not self.left

    def refuse(self) -> None:
        """Raise MismatchError (exit 7) where something is left."""
        if not self.left:
            return
        fixable = sum(trouble.fixable for trouble in self.left)
        hint = f"--fix repairs {fixable} of them in place" if fixable else self.command(self.left[0])
        things = "1 problem" if len(self.left) == 1 else f"{len(self.left)} problems"
        raise MismatchError(
            f"{self.folder}: {things} would make {self.consumer} fail or answer wrongly", hint=hint or None
        )

    def command(self, trouble: Trouble) -> str:
        """The hint of a trouble, with the folder in its command."""
        return re.sub(r"\bDIR\b", lambda _: shlex.quote(self.folder), trouble.hint)

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.folder,
            "layout": self.layout,
            "consumer": self.consumer,
            "sound": bool(self),
            "troubles": [trouble.as_json() for trouble in self.troubles],
            "changed": list(self.changed),
            "backup": self.backup,
        }


def diagnose(job: DoctorJob, say: Reporter) -> Diagnosis:
    """Raises UsageError for a consumer or version not known, InputError for what is no folder; what opening raises."""
    consumer, version = _consumer(job.consumer, say)
    path = Path(job.folder)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder", hint="doctor looks at the folder that a program is to load")
    found = recognise(path)
    wanted = layout_named(consumer)
    target = layout_named(found.layout).target
    if target is not None and target.adapters_alone:
        trouble = _adapter(found.open(OpenOptions()), consumer, wanted.name)
        return Diagnosis(str(path), found.layout, job.consumer, (trouble,))
    if found.layout != wanted.name:
        hint = f"llava-convert convert {shlex.quote(str(path))} --to {wanted.name} -o OUT"
        what = f"{consumer} does not load the {found.layout} layout"
        source = f"it loads the {wanted.name} layout"
        return Diagnosis(str(path), found.layout, job.consumer, (Trouble("layout", what, source, False, False, hint),))
    folder = Folder(found.open(OpenOptions(dequantize=True)))
    alone = folder.checkpoint.default_part
    if alone != ALL and consumer in (TRANSFORMERS, VLLM):
        raise InputError(
            f"{path} is a {PART_NAMES[alone]} alone", hint="doctor looks at a whole LLaVA: give its folder"
        )
    rules = [rule for rule in RULES if rule.concerns(consumer, version)]
    troubles = _examined(folder, rules, fix=job.fix)
    changed = {name: data for name, data in folder.changed.items() if not _as_it_was(folder, name, data)}
    backup = _replace(path, folder.checkpoint, changed) if changed else None
    if backup is not None:
        say.note(f"the folder as it was is {backup}; its weights are the same files, not copies")
    return Diagnosis(
        str(path), found.layout, job.consumer, troubles, tuple(sorted(changed)), None if backup is None else str(backup)
    )


def _examined(folder: Folder, rules: list[Rule], *, fix: bool) -> tuple[Trouble, ...]:
    """What each rule finds; with `fix` each is repaired before the next one looks, and looked at again.

    Without, the same is tried on a copy, so that only what a repair would mend is said to be fixable.
    """
    found, mended = [], folder if fix else replace(folder, changed={})
    for rule in rules:
        every = list(rule.check(folder))
        helps = False
        if every and rule.fix is not None:
            rule.fix(mended)
            helps = not list(rule.check(mended))
        found += [Trouble(rule.name, what, rule.source, helps, helps and fix, rule.hint) for what in every]
    return tuple(found)


def _adapter(checkpoint: Checkpoint, consumer: str, to: str) -> Trouble:
    """A LoRA alone, which answers nothing without its base: how to merge it, and where it is applied as it is."""
    what = f"it is a LoRA adapter, which {consumer} does not load as a model"
    if checkpoint.base is not None:
        what += f"; its base is {checkpoint.base}"
    source = "its README says how peft loads it onto its base; merged it is a whole model, for every program"
    base = shlex.quote(checkpoint.base or "BASE")
    return Trouble("adapter", what, source, False, False, f"llava-convert merge {base} DIR --to {to} -o OUT")


def _consumer(word: str, say: Reporter) -> tuple[str, tuple[int, ...] | None]:
    """`transformers@4.46`: the program, and its version where one is named.

    Raises UsageError for a version of which no rule is known. A newer one is judged by the last that is known, and it
    is said; so it is of a program whose rules are of no version.
    """
    name, _, version = word.strip().lower().partition("@")
    if name not in CONSUMERS:
        raise not_a_choice("--for", word, CONSUMERS)
    if not version:
        return name, None
    if name != TRANSFORMERS:
        say.note(f"the rules for {name} are the same for every version, so {version} has no effect")
        return name, None
    try:
        found = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        raise UsageError(
            f"--for {word}: {version} is not a version", hint=f"write {TRANSFORMERS}@{_dotted(OLDEST)}"
        ) from None
    found = (*found, 0)[:2]  # 5 is 5.0
    if found < OLDEST:
        raise UsageError(
            f"--for {word}: the rules know {TRANSFORMERS} from {_dotted(OLDEST)} to {_dotted(NEWEST)}",
            hint=f"--for {TRANSFORMERS}@{_dotted(OLDEST)} is the oldest",
        )
    if found > NEWEST:
        say.note(f"{TRANSFORMERS} {version} is judged by the rules of {_dotted(NEWEST)}, the newest that is known")
    return name, found


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _as_it_was(folder: Folder, name: str, data: bytes) -> bool:
    return folder.beside.has(name) and folder.beside.read(name) == data


def _replace(path: Path, checkpoint: Checkpoint, changed: Mapping[str, bytes]) -> Path:
    """Put a folder with the changed files in the place of this one, in one step; returns where the old one is.

    Weights, and all that stays, are links to the same files. Raises OutputError where a backup is there already, where
    the folder lies elsewhere, or where the system refuses.
    """
    if path.resolve() != checkpoint.root.resolve() or path.is_symlink():
        raise OutputError(f"{path} is a link, or not the model's folder", hint="give the folder itself")
    path = path.resolve()
    backup, new = path.with_name(path.name + BACKUP), path.with_name(f".{path.name}.doctor")
    if os.path.lexists(backup):
        raise OutputError(f"{backup} is there already", hint="move it away: it is the folder before an earlier repair")
    try:
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(path, new, symlinks=True, copy_function=_linked)
        for name, data in changed.items():
            (new / name).unlink(missing_ok=True)
            (new / name).write_bytes(data)
        exchange(new, path, backup)
    except OSError as problem:
        shutil.rmtree(new, ignore_errors=True)
        raise OutputError(
            f"{path} cannot be repaired: {problem.strerror or problem}",
            hint="copy it to a place that you may write to",
        ) from problem
    return backup


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)
