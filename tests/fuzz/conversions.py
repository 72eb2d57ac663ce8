"""Whole conversions of sources of which one file is damaged: by kind of file, each case the same for the same number.

A case converts to one of the targets in this process, as the Python face does. It may end in a new output (0) or in a
refusal that a source can deserve: exit codes 3, 4, 5, 7. Everything else is a finding: another exception, too much time
or memory, something left behind, an output that `verify` tells from its source, or one that an independent reader
refuses although it takes the source (`judges`).
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import llava_convert
from llava_convert.core.errors import ConvertError
from tests.faults.corpus import TINY
from tests.fuzz import container_damage as containers
from tests.fuzz.json_damage import damaged_json
from tests.fuzz.judges import OF_LAYOUT, PARTS, complaints
from tests.fuzz.targets import PICKLE_WORDS, PYTHON_WORDS, ZIP_WORDS

SECONDS = 20  # of one case, which takes a tenth of one
MEMORY_MB = 300  # above what the process held before
CODES = (3, 4, 5, 7)
MOST_TEXT = 8000  # characters of a message, which is to fit a screen or two

Damage = Callable[[bytes, Random], bytes]
CARD = """---
license: other
license_name: some-license
license_link: https://example.org/license
base_model:
- org/base
base_model_relation: finetune
language: [en, zh]
tags:
- llava
- vision
datasets: org/data
pipeline_tag: image-text-to-text
library_name: transformers
new_version: org/new
model-index:
- name: x
---

# A model

Text.
"""


@dataclass(frozen=True)
class Kind:
    """One kind of file: the source it is damaged in, its name there, and the targets."""

    layout: str
    file: str
    targets: tuple[str, ...]
    folder: str = ""  # of the source, where it is not named as the layout


KINDS: dict[str, Kind] = {
    "config.json": Kind("hf", "config.json", ("official", "gguf", "xtuner")),
    "official/config.json": Kind("official", "config.json", ("hf", "gguf", "xtuner")),
    "generation_config.json": Kind("hf", "generation_config.json", ("official", "gguf", "xtuner")),
    "preprocessor_config.json": Kind("hf", "preprocessor_config.json", ("official", "gguf", "xtuner"), "plain"),
    "processor_config.json": Kind("hf", "processor_config.json", ("official", "gguf", "xtuner"), "fused"),
    "adapter_config.json": Kind("xtuner", "visual_encoder_adapter/adapter_config.json", ("hf", "official", "gguf")),
    "tokenizer_config.json": Kind("official", "tokenizer_config.json", ("hf", "gguf", "xtuner")),
    "tokenizer.json": Kind("official", "tokenizer.json", ("hf", "gguf", "xtuner")),
    "index.json": Kind("hf", "model.safetensors.index.json", ("official", "gguf", "xtuner"), "shards"),
    "model.gguf": Kind("gguf", "m-f16.gguf", ("hf", "official", "xtuner")),
    "mmproj.gguf": Kind("gguf", "m-mmproj-f16.gguf", ("hf", "official", "xtuner")),
    "model.safetensors": Kind("hf", "model.safetensors", ("official", "gguf", "xtuner")),
    "iter.pth": Kind("pth", "iter_2.pth", ("hf", "official", "gguf", "xtuner")),
    "README.md": Kind("hf", "README.md", ("official", "gguf", "xtuner")),
}


@dataclass(frozen=True)
class Outcome:
    """How a case ended: the exit code, and where that is a finding the place and the words."""

    code: int
    place: str = ""
    words: str = ""


class _LateError(BaseException):
    """A case takes too long. No Exception, so that nobody takes it for a fault of the input."""


class _BugError(Exception):
    """What no input may raise, which is its cause; `outcome` is what is told of it."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.words)
        self.outcome = outcome


@dataclass
class Bench:
    """Sources to damage, in a folder of its own, which is small: best one in memory."""

    home: Path
    _sound: dict[Path, bytes] = field(default_factory=dict)

    def source(self, kind: Kind) -> Path:
        """The folder, or the .pth, that a kind is damaged in; made when it is first asked for."""
        folder = self.home / (kind.folder or kind.layout)
        if not folder.exists():
            self._make(kind, folder)
        return folder / kind.file if kind.layout == "pth" else folder

    def _make(self, kind: Kind, folder: Path) -> None:
        if kind.layout == "pth":
            shutil.copytree(TINY, folder)
            return
        limit = "200kB" if kind.folder == "shards" else None
        llava_convert.convert(TINY / "iter_2.pth", to=kind.layout, out=folder, name="m", max_shard_size=limit)
        if kind.folder == "plain":  # which processor_config.json says over again
            (folder / "processor_config.json").unlink()
        if kind.folder == "fused":  # as transformers 5 saves it
            pictures, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
            fused = json.loads(whole.read_bytes()) | {"image_processor": json.loads(pictures.read_bytes())}
            whole.write_text(json.dumps(fused), encoding="utf-8")
            pictures.unlink()
        if kind.file == "README.md":
            (folder / "README.md").write_text(CARD, encoding="utf-8")

    def attempt(self, name: str, number: int, *, judge: bool = True, reraise: bool = False) -> Outcome:
        """Convert one damaged source; with `judge`, what was made is shown to `verify` and to others' readers.

        With `reraise` an error that is no refusal is raised as it is.
        """
        kind, rng = KINDS[name], Random(f"{name} {number}")
        source = self.source(kind)
        path = source if kind.layout == "pth" else source / kind.file
        sound = self._sound.setdefault(path, path.read_bytes())
        damage, to = self._damage(kind, path), rng.choice(kind.targets)
        work = self.home / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        path.write_bytes(damage(sound, rng))
        try:
            return self._judged(kind, source, to, work / "out", judge)
        except _BugError as bug:
            if reraise:
                raise
            return bug.outcome
        finally:
            path.write_bytes(sound)

    def damaged(self, name: str, number: int) -> bytes:
        """The file of a case, for a replay."""
        kind, rng = KINDS[name], Random(f"{name} {number}")
        source = self.source(kind)
        path = source if kind.layout == "pth" else source / kind.file
        damage = self._damage(kind, path)
        rng.choice(kind.targets)
        return damage(path.read_bytes(), rng)

    def _damage(self, kind: Kind, path: Path) -> Damage:
        match path.suffix:
            case ".gguf":
                fields = containers.gguf_spots(path)
                return lambda data, rng: containers.damaged_gguf(data, rng, fields)
            case ".safetensors":
                return containers.damaged_safetensors
            case ".pth":
                words = PICKLE_WORDS + ZIP_WORDS
                return lambda data, rng: containers.damaged_pth(data, rng, words, PYTHON_WORDS)
            case ".md":
                return containers.damaged_card
        others = self._others(path)
        return lambda data, rng: damaged_json(data, rng, others)

    def _others(self, path: Path) -> dict[str, Any]:
        """The keys of the configs beside a file."""
        found: dict[str, Any] = {}
        for beside in sorted(path.parent.glob("*config.json")):
            if beside != path:
                found |= json.loads(beside.read_bytes())
        return found

    def _judged(self, kind: Kind, source: Path, to: str, out: Path, judge: bool) -> Outcome:
        options: dict[str, Any] = {"visual_encoder": TINY / "vit"} if kind.layout == "xtuner" else {}
        base = {"visual_encoder": TINY / "vit", "llm": TINY / "llm"} if kind.layout == "pth" else options
        try:
            with _bounded():
                llava_convert.convert(source, to=to, out=out, name="m", **base)
        except ConvertError as refusal:
            return _refused(refusal, to, out.parent)
        except (Exception, _LateError) as problem:
            told = f"to {to}: {type(problem).__name__}: {str(problem)[:300]}"
            raise _BugError(Outcome(1, _place(problem), told)) from problem
        left = sorted(path.name for path in out.parent.iterdir())
        if left != ["out"]:
            return Outcome(0, "left behind", f"to {to}: {left}")
        if not judge:
            return Outcome(0)
        said = _verified(source, out, base) or _refused_by_others(kind, source, to, out)
        return Outcome(0, *(said or ("", "")))


def _refused(refusal: ConvertError, to: str, work: Path) -> Outcome:
    text = f"{refusal.message}\n{refusal.hint or ''}"
    code, where = refusal.exit_code, f"to {to}: {text[:400]!r}"
    if code not in CODES:
        return Outcome(code, f"exit {code}", where)
    if not refusal.message or len(text) > MOST_TEXT or not all(line.isprintable() for line in text.split("\n")):
        return Outcome(code, "a message that cannot be shown", where)
    if left := sorted(path.name for path in work.iterdir()):
        return Outcome(code, "left behind", f"to {to}: {left}")
    return Outcome(code)


def _verified(source: Path, out: Path, bases: dict[str, Any]) -> tuple[str, str] | None:
    try:
        with _bounded():
            found = llava_convert.verify(source, out, **bases)
    except (Exception, _LateError) as problem:
        told = f"{type(problem).__name__}: {str(problem)[:300]}"
        raise _BugError(Outcome(0, f"verify {_place(problem)}", told)) from problem
    return None if found else ("verify tells them apart", f"{found}"[:400])


def _refused_by_others(kind: Kind, source: Path, to: str, out: Path) -> tuple[str, str] | None:
    refused = complaints(out, OF_LAYOUT[to])
    if not refused:
        return None
    # Of the source only where it differs: a reader that does not take it has said nothing of the conversion.
    asked = {name for one in refused for name in (one, *PARTS.get(one, ())) if name in OF_LAYOUT[kind.layout]}
    excused = complaints(source, tuple(asked))
    for name, words in refused.items():
        if not {name, *PARTS.get(name, ())} & excused.keys():
            return f"{name} refuses {to}: {words[:60]}", words
    return None


def _place(problem: BaseException) -> str:
    """What was raised and where in the package, so that one bug counts once."""
    step, at = problem.__traceback__, ""
    while step is not None:
        code = step.tb_frame.f_code.co_filename
        if "llava_convert" in code:
            at = f"{Path(code).name}:{step.tb_lineno}"
        step = step.tb_next
    return f"{type(problem).__name__} {at}".strip()


@contextmanager
def _bounded() -> Iterator[None]:
    """Raise _LateError after SECONDS, or where memory grew by more than MEMORY_MB."""

    def late(*_: object) -> None:
        raise _LateError(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    held = _memory("VmRSS")
    _forget_peak()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    grown = _memory("VmHWM") - held
    if grown > MEMORY_MB << 20:
        raise _LateError(f"{grown >> 20} MB of memory")


def _memory(key: str) -> int:
    """Bytes that Linux says of this process, as VmRSS; elsewhere the peak since its start, which may hide a case's."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return
