"""Every layout there is, and which one a path holds.

A layout is one module here and one table in `mappings/layouts`; the engine asks this registry and knows none by name.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path, PureWindowsPath
from typing import cast

from llava_convert.core.errors import ConvertError, InputError, UnsupportedError
from llava_convert.core.text import printable
from llava_convert.core.values import dataclass
from llava_convert.layouts import kinds
from llava_convert.layouts.adapter_folder import is_adapter
from llava_convert.layouts.base import Found, Layout, OpenOptions
from llava_convert.layouts.info import LAYOUTS
from llava_convert.layouts.trainer_run import followed, has_weights
from llava_convert.model.checkpoint import Checkpoint
from llava_convert.model.quantized import with_quantization
from llava_convert.model.tables.facts import CONFIG
from llava_convert.model.tables.names import layout_table
from llava_convert.model.tables.quantization import files as quantization_files
from llava_convert.storage.distributed import recognise as recognise_shares
from llava_convert.storage.files import open_regular, read_fully, require_inside
from llava_convert.storage.safetensors import SUFFIX, read_header
from llava_convert.storage.sidecars import folder_sidecars, refuse_links_out
from llava_convert.storage.weights import NoWeightsError, index_of

SOURCES = tuple(LAYOUTS)
OpenEach = Callable[[Found, OpenOptions], list[Checkpoint]]
_LOOKED_AT = 50  # files of a folder that is no checkpoint
# What mmengine calls the checkpoints of a training (`CheckpointHook`), by steps or by epochs.
_SAVE = re.compile(r"(?:iter|epoch)_(\d{1,12})\.pth")
# One of several shards; the index beside it says what belongs together.
_SHARD = re.compile(r"-\d+-of-\d+\.[a-z]+$")


def layout(name: str) -> Layout:
    return cast(Layout, import_module(f"llava_convert.layouts.{name}"))


def dialects(name: str) -> list[str]:
    """What a layout's names are told apart by: what its module says, else the dialects of its table."""
    told: Callable[[], list[str]] | None = getattr(layout(name), "dialects", None)
    return told() if told is not None else sorted({row.dialect for row in layout_table(name).rows})


def family_names(model_type: str) -> dict[str, str]:
    """What layouts that have names of their own for families call one."""
    asked = {name: getattr(layout(name), "family_name", None) for name in SOURCES}
    return {name: told for name, ask in asked.items() if ask is not None and (told := ask(model_type)) is not None}


def outtypes() -> dict[str, tuple[str, list[str]]]:
    """The types of files that can be asked for: by name the type of most weights, and other names of the same."""
    asked = [getattr(layout(name), "file_types", None) for name in SOURCES]
    return {name: found for ask in asked if ask is not None for name, found in ask().items()}


def locate(path: Path) -> Path:
    """The checkpoint that a path means: itself, or what a training work_dir's `last_checkpoint` names."""
    path = path.expanduser()
    pointer = path / "last_checkpoint"
    if not path.is_dir() or not pointer.is_file():
        return path
    with open_regular(require_inside(path, pointer.name)) as stream:
        text = read_fully(stream, 4096, pointer).decode("utf-8", "replace").strip()
    # It is a path on the machine that trained: the file itself moved along with the folder, and keeps its last name.
    name = PureWindowsPath(text).name
    try:
        for candidate in (path / name, Path(text), path / text):
            if name and candidate.exists():
                return candidate
    except (OSError, ValueError):
        pass  # no name of a file on this system, so none that is there
    raise InputError(f"{pointer} names '{printable(name)}', which does not exist", hint="give the checkpoint itself")


def look(path: Path, config_from: Path | None = None) -> Found:
    """What every layout judges by, with the small files of `config_from` where that is given.

    Raises InputError for a broken config.json, and where `config_from` has none.
    """
    is_folder = path.is_dir()
    names = frozenset(p.name for p in path.iterdir()) if is_folder else frozenset[str]()
    if config_from is not None and not (config_from / CONFIG).is_file():
        raise InputError(
            f"{config_from} is not a model folder: it has no {CONFIG}",
            hint=f"give the folder with the model's {CONFIG} and tokenizer by --config-from",
        )
    folder = config_from or (_config_folder(path, names) if is_folder else path.parent)
    beside = folder_sidecars(folder)
    config = beside.read_json(CONFIG) if (config_from or is_folder) and (folder / CONFIG).is_file() else None
    return Found(path, config if isinstance(config, dict) else None, names, beside)


def _config_folder(path: Path, names: frozenset[str]) -> Path:
    """The folder of a model's small files: its own, or that around (verl: within) what processes saved in shares."""
    if CONFIG in names or is_adapter(names) or recognise_shares(path, names) is None:
        return path  # an adapter's own settings lie beside it, and its layout looks for the run's config itself
    around = (path / "huggingface", path.parent, path.parent.parent)
    return next((folder for folder in around if (folder / CONFIG).is_file()), path)


def _whole(found: Found) -> dict[str, str]:
    return {name: why for name in SOURCES if (why := layout(name).detect(found)) is not None}


def _part(found: Found) -> dict[str, str]:
    asked = {name: getattr(layout(name), "detect_part", None) for name in SOURCES}
    return {name: why for name, ask in asked.items() if ask is not None and (why := ask(found)) is not None}


@dataclass(frozen=True)
class Recognised:
    """A source that was looked at and not yet opened: its layout, and why it was taken for that.

    `alone`: it is one part of a LLaVA, as its own class keeps it.
    """

    found: Found
    layout: str
    why: str
    alone: bool = False

    def open(self, options: OpenOptions | None = None) -> Checkpoint:
        """Raises what the layout's `open` raises, and UnsafeError for a link that leaves the folder.

        IncompleteError says what lies there instead of weights.
        """
        self._refuse_links_out()
        try:
            opened = layout(self.layout).open(self.found, options or OpenOptions())
        except NoWeightsError:
            if (told := kinds.known(self.found)) is not None:
                raise kinds.IncompleteError(self.found.path, told) from None
            raise
        files = self.found.beside
        beside = {name: files.read_json(name) for name in quantization_files() if files.has(name)}
        objects = {name: said for name, said in beside.items() if isinstance(said, dict)}
        found = with_quantization(opened, self.found.config, objects)
        return replace(found, notes=(*self.found.notes, *found.notes)) if self.found.notes else found

    def open_each(self) -> list[Checkpoint]:
        """Every model there: one, but for a layout that keeps several types of one model side by side."""
        several: OpenEach | None = getattr(layout(self.layout), "open_each", None)
        if several is None:
            return [self.open()]
        self._refuse_links_out()
        return several(self.found, OpenOptions())

    def _refuse_links_out(self) -> None:
        for folder in {self.found.path, self.found.beside.where}:
            if folder.is_dir() and (folder == self.found.path or self.found.config is not None):
                refuse_links_out(folder)


def recognise(path: Path, name: str | None = None, config_from: Path | None = None) -> Recognised:
    """The source that a path means, of layout `name` or of the one that it is found to be.

    `config_from` is the folder of its small files, where these are elsewhere. A training's folder means its best or
    newest checkpoint, a file of weights with the config of its model beside it that model.

    Raises UnsupportedError (exit 4) when the path is of no known layout, of several, or of another than `name`;
    NotAModelError where a row of `mappings/kinds.toml` knows what it is instead.
    """
    found = look(locate(path), config_from)
    if config_from is not None and _whole(itself := replace(found, config=None)):
        found = itself  # it says itself what it is, and has no use for another's config
    claims, alone = _claims(found)
    meant = _of_a_run(found) if not claims or not has_weights(found) else None
    if not claims and meant is None:
        meant = _newest_save(found) or _model_around(found)
    if meant is not None:
        found, how = meant
        found = replace(found, notes=(how,))
        claims, alone = _claims(found)
    return Recognised(found, *_choose(found, name, claims), alone)


def as_adapter(path: Path) -> Recognised:
    """The adapter that a path means: where one lies beside a whole model, not that model. Raises as `recognise`."""
    found = look(locate(path))
    claims = {
        name: why for name in SOURCES if (ask := getattr(layout(name), "detect_beside", None)) and (why := ask(found))
    }
    if claims:
        return Recognised(found, *next(iter(claims.items())))
    return recognise(path)


def _claims(found: Found) -> tuple[dict[str, str], bool]:
    """The layouts that a path could be of, with why; and whether it is one part alone.

    Raises what the layouts' readers raise, or NotAModelError where a row knows a thing that they cannot read.
    """
    try:
        whole = _whole(found)
        return (whole, False) if whole else (_part(found), True)
    except (InputError, UnsupportedError) as problem:
        # What the system did not let us read once is not judged by what it lets us read a moment later.
        unread = isinstance(problem, InputError) and problem.unread is not None
        if not unread and (told := kinds.known(found)) is not None:
            raise kinds.NotAModelError(found.path, told) from None
        raise


def _of_a_run(found: Found) -> tuple[Found, str] | None:
    """The checkpoint that is meant in the folder of a run of HF Trainer, and how it was found."""
    run = followed(found)
    return None if run is None else (look(run.checkpoint), run.note)


def _newest_save(found: Found) -> tuple[Found, str] | None:
    """The checkpoint of the most steps in a training's folder, and how it was found."""
    saves = {int(match[1]): name for name in found.names if (match := _SAVE.fullmatch(name)) is not None}
    if not saves:
        return None
    name = saves[max(saves)]
    return look(require_inside(found.path, name)), f"{name} is the newest of {len(saves)} checkpoints in {found.path}"


def _model_around(found: Found) -> tuple[Found, str] | None:
    """The model of which a file holds the weights, with its config and small files beside it; and how it was found.

    That file counts then; of a shard the index, if there is one.
    """
    path = found.path
    if not path.is_file() or found.config is not None or not (path.parent / CONFIG).is_file():
        return None
    told = kinds.known(found)
    index = index_of(path)
    if index is None and (told is None or not told.weights):
        return None
    around = replace(look(path.parent), file=index or path, headers=found.headers)
    return (around, f"{path.name} is a file of the model in {path.parent}") if _claims(around)[0] else None


def open_checkpoint(path: Path, name: str | None = None, options: OpenOptions | None = None) -> tuple[Checkpoint, str]:
    """Open a source; also returns why it was taken for its layout. Raises what `recognise` and `open` raise."""
    source = recognise(path, name)
    return source.open(options), source.why


def _choose(found: Found, name: str | None, claims: Mapping[str, str]) -> tuple[str, str]:
    """The layout to open a path as, and why. Raises UnsupportedError (exit 4)."""
    path = found.path
    if name is not None and name not in claims and claims:
        other, why = next(iter(claims.items()))
        raise UnsupportedError(
            f"{path} is not of the {name} layout but {other}: {why}",
            hint=f"use `llava-convert {other} {path}`, or `convert`, which detects it",
        )
    if name is None and len(claims) > 1:
        raise UnsupportedError(
            f"{path} could be of more than one layout: " + "; ".join(f"{n} ({why})" for n, why in claims.items()),
            hint=f"say which: `llava-convert {'|'.join(claims)}`",
        )
    if not claims:
        if (kind := recognise_shares(path, found.names)) is not None and found.config is None:
            use = f"a model in pieces; the model's {CONFIG} lies neither in it nor in the folder around it"
            command = f"llava-convert convert {shlex.quote(str(path))} --config-from FOLDER --to hf"
            raise kinds.IncompleteError(path, kinds.Known("shares", kind, use, command))
        raise _unknown(found)
    chosen = name or next(iter(claims))
    return chosen, claims[chosen]


def _unknown(found: Found) -> UnsupportedError:
    """What to say of a path that no layout claims: what it is instead, or what within it is one.

    Raises InputError for a file of weights that is cut or broken.
    """
    path = found.path
    if path.is_file() and path.suffix.lower() == SUFFIX:
        read_header(path)
    if kinds.known(found) is None:
        entries = sorted((path / name for name in found.names if not name.startswith(".")), key=_age)
        within = _claimed(entries[:_LOOKED_AT])
        if within is not None:
            use = f"{within.name} in it is one, which can be converted"
            command = shlex.join(["llava-convert", "inspect", str(within)])
            return kinds.NotAModelError(path, kinds.Known("folder", "a folder around a checkpoint", use, command))
    return kinds.refusal(found)


def _claimed(paths: Iterable[Path]) -> Path | None:
    """The first of these that a layout claims: as a whole model, else as a part."""
    looked: list[Found] = []
    for path in paths:
        with suppress(ConvertError, OSError):  # what cannot be read is none
            looked += [look(path)] if path.exists() else []
    for claims in (_whole, _part):
        for found in looked:
            with suppress(ConvertError, OSError):
                if claims(found):
                    return found.path
    return None


def _age(path: Path) -> float:
    """For sorting: the newest first, so that of a training's checkpoints the last is found."""
    try:
        return -path.lstat().st_mtime
    except OSError:
        return 0.0
