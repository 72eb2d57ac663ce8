"""Every layout there is, and which one a path holds.

A layout is one module here and one table in `mappings/layouts`; the engine asks this registry and knows none by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path, PureWindowsPath
from typing import cast

from llava_convert.core.errors import ConvertError, InputError, UnsupportedError
from llava_convert.core.text import printable
from llava_convert.layouts.base import Found, Layout, OpenOptions
from llava_convert.layouts.info import LAYOUTS
from llava_convert.layouts.trainer_run import followed, has_weights
from llava_convert.model.checkpoint import Checkpoint
from llava_convert.model.tables.names import layout_table
from llava_convert.storage.files import open_regular, read_fully, require_inside
from llava_convert.storage.safetensors import SUFFIX, read_header
from llava_convert.storage.sidecars import folder_sidecars, refuse_links_out

SOURCES = tuple(LAYOUTS)
OpenEach = Callable[[Found, OpenOptions], list[Checkpoint]]
_LOOKED_AT = 50  # files of a folder that is no checkpoint


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
    raise InputError(f"{pointer} names '{printable(name)}', which is not there", hint="give the checkpoint itself")


def look(path: Path) -> Found:
    """What every layout judges by. Raises InputError for a broken config.json."""
    if path.is_dir():
        names = frozenset(p.name for p in path.iterdir())
        beside = folder_sidecars(path)
        config = beside.read_json("config.json") if "config.json" in names else None
        return Found(path, config if isinstance(config, dict) else None, names, beside)
    return Found(path, None, frozenset(), folder_sidecars(path.parent))


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
        """Raises what the layout's `open` raises, and UnsafeError for a link that leaves the folder."""
        self._refuse_links_out()
        opened = layout(self.layout).open(self.found, options or OpenOptions())
        return replace(opened, notes=(*self.found.notes, *opened.notes)) if self.found.notes else opened

    def open_each(self) -> list[Checkpoint]:
        """Every model there: one, but for a layout that keeps several types of one model side by side."""
        several: OpenEach | None = getattr(layout(self.layout), "open_each", None)
        if several is None:
            return [self.open()]
        self._refuse_links_out()
        return several(self.found, OpenOptions())

    def _refuse_links_out(self) -> None:
        if self.found.path.is_dir():
            refuse_links_out(self.found.path)


def recognise(path: Path, name: str | None = None) -> Recognised:
    """The source that a path means, of layout `name` or of the one that it is found to be.

    Raises UnsupportedError (exit 4) when it is of no known layout, of several, or of another than `name`.
    """
    found = look(locate(path))
    claims, alone = _claims(found)
    if (not claims or not has_weights(found)) and (run := followed(found)) is not None:
        found = replace(look(run.checkpoint), notes=(run.note,))
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


def open_checkpoint(path: Path, name: str | None = None, options: OpenOptions | None = None) -> tuple[Checkpoint, str]:
    """Open a source; also returns why it was taken for its layout. Raises what `recognise` and `open` raise."""
    source = recognise(path, name)
    return source.open(options), source.why


def _claims(found: Found) -> tuple[dict[str, str], bool]:
    """The layouts that a path could be of, with why; and whether it is one part alone."""
    whole = _whole(found)
    return (whole, False) if whole else (_part(found), True)


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
        if any((folder / ".metadata").is_file() for folder in (path, path / "pytorch_model_fsdp_0")):
            raise UnsupportedError(
                f"{path} is a distributed checkpoint of torch (FSDP or DCP), which cannot be read yet",
                hint="merge it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pth, "
                "or accelerate merge-weights; then convert what that writes",
            )
        raise _unknown(found)
    chosen = name or next(iter(claims))
    return chosen, claims[chosen]


def _unknown(found: Found) -> UnsupportedError:
    """What to say of a path that no layout claims: what it is instead, and what beside or within it is one.

    Raises InputError for a file of weights that is cut or broken.
    """
    path = found.path
    said = f"{path} is no LLaVA that this tool knows"
    if path.is_file():
        if path.suffix.lower() == SUFFIX:
            read_header(path)
        around = _claimed([path.parent])
        hint = f"it is a file of the model in {path.parent}: give that folder" if around else None
        return UnsupportedError(said, hint=hint)
    if found.config is not None:
        said += f": its config.json is that of a {printable(found.config.get('model_type'))}"
    elif not found.names:
        said += ": the folder is empty"
    within = _claimed(sorted((path / name for name in found.names if not name.startswith(".")), key=_age)[:_LOOKED_AT])
    return UnsupportedError(said, hint=f"it holds {within.name}: give {within}" if within is not None else None)


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
