"""Base models: where the weights and configs come from that a partial checkpoint lacks.

A base is named by a folder or a hub id. Folders that a source names are looked for under the current folder,
then under the source's parents, since training configs name them relative to where training ran.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from llava_convert.core.errors import HubError, InputError, UnsupportedError
from llava_convert.core.hub_names import is_id, parse, published_id
from llava_convert.core.tensors import StoredTensor
from llava_convert.core.values import dataclass
from llava_convert.model.checkpoint import LLM, PART_NAMES, PART_WORDS, Dropped, Part
from llava_convert.model.configs import named_config, old_flavour
from llava_convert.model.tables.names import layout_table, lookup_errors
from llava_convert.model.tables.quantization import quantization
from llava_convert.model.tables.types import read_config
from llava_convert.storage.remote.origin import cached_id
from llava_convert.storage.remote.session import Session
from llava_convert.storage.sidecars import Sidecars, folder_sidecars, refuse_links_out
from llava_convert.storage.weights import Weights, open_weights

FOLDER_HINT = "name its folder, or a hub id: "  # and the option, with PATH


@dataclass(frozen=True)
class Base:
    """One base model on disk. `asked` is how it was named: an id, or a path (which never reaches an output).

    `held` is the part as it was opened, where the base is a whole LLaVA of whichever layout; else the folder holds the
    part alone, as its own class keeps it. What is read of it is kept, so that all who ask in one session read it once.
    """

    part: str
    folder: Path
    asked: str
    from_hub: bool
    files: Sidecars
    file: Path | None = None  # the one file of weights that counts, where the user named it
    held: Part | None = None

    @property
    def id(self) -> str | None:
        """The hub id, when the name or the folder gives one for certain.

        A LLaVA's own tower has none: a loader of towers can take it from no address.
        """
        if self.held is not None and self.part != LLM:
            return None
        return published_id(self.asked) if self.from_hub else cached_id(self.folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The part's own config, in the old flavour, complete (a CLIPModel's vision half for the tower)."""
        if self.held is not None:
            return named_config(self.held.config or {}, self.part, where=str(self.folder))
        raw = read_config(self.files, "config.json")
        config = old_flavour(raw)
        if self.part != LLM and isinstance(config.get("vision_config"), dict):
            nested = old_flavour(config["vision_config"])
            kind = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}.get(str(config.get("model_type")))
            if kind is not None:
                nested["model_type"] = kind
            config = {**nested, "torch_dtype": nested.get("torch_dtype") or config.get("torch_dtype")}
            config.setdefault("_name_or_path", raw.get("_name_or_path"))
        if (how := quantization(raw, {}, ())) is not None:
            raise UnsupportedError(
                f"the {PART_NAMES[self.part]} {self.folder.name} is stored quantised ({how})",
                hint=f"give the full-precision model, as a base by --{PART_WORDS[self.part]}",
            )
        return named_config(config, self.part, where=str(self.folder / "config.json"))

    @cached_property
    def weights(self) -> Weights:
        return open_weights(self.file or self.folder)

    @cached_property
    def _mapped(self) -> tuple[dict[str, StoredTensor], tuple[Dropped, ...]]:
        table = layout_table("parts")
        found: dict[str, StoredTensor] = {}
        dropped: list[Dropped] = []
        unknown: dict[str, str] = {}
        for name, tensor in self.weights.tensors.items():
            disk = f"{PART_WORDS[self.part]}/{name}"
            reason = table.dropped(disk)
            if reason is not None:
                dropped.append(Dropped(name, reason))
                continue
            meaning = table.read(disk)
            if meaning is None:
                unknown[disk] = name
            elif meaning.canonical in found:
                raise InputError(f"{self.folder}: two tensors stand for {meaning.canonical}")
            else:
                found[meaning.canonical] = tensor
        if unknown:
            raise UnsupportedError(f"base {PART_NAMES[self.part]} {self.folder}: {lookup_errors(unknown, table)}")
        return found, tuple(dropped)

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Canonical name → tensor."""
        return self._mapped[0]

    @property
    def weights_part(self) -> Part:
        """The part with its weights, whether they lie alone or in a whole model."""
        return Part(self.tensors) if self.held is None else self.held

    @property
    def dropped(self) -> tuple[Dropped, ...]:
        return self._mapped[1] if self.held is None else ()


def find_base(
    part: str, asked: str, source: Path, session: Session, *, explicit: bool, weights: bool = True, cache: bool = False
) -> Base:
    """The base named `asked`: a folder, or a hub id (from its client's cache if all is there, else read in place).

    `cache` downloads it to that cache first. `explicit` says that the user named it, so that only the current folder
    counts. A session has one Base of a folder, which is read once. Raises InputError (exit 3) naming it and the option
    which mends it.
    """
    option = f"--{PART_WORDS[part]}"
    folder = local_base(asked, source, explicit=explicit)
    if folder is not None:
        if not (folder / "config.json").exists():
            raise InputError(
                f"{folder} is not a model folder: it has no config.json",
                hint=f"name the folder of the base {PART_NAMES[part]}: {option} PATH",
            )
        return _base(part, folder, asked, session, from_hub=False)
    if not is_id(asked):
        raise InputError(
            f"the base {PART_NAMES[part]} {asked!r} was not found"
            + ("" if explicit else " in the current folder, nor in those above the source"),
            hint=f"{FOLDER_HINT}{option} PATH",
        )
    folder = _from_hub(part, asked, option, session, weights=weights, cache=cache)
    return _base(part, folder, asked, session, from_hub=True)


def _base(part: str, folder: Path, asked: str, session: Session, *, from_hub: bool) -> Base:
    def make() -> Base:
        if not from_hub:
            refuse_links_out(folder)
        return Base(part, folder, asked, from_hub, folder_sidecars(folder))

    return session.once((Base, part, folder, asked), make)


def is_folder(asked: str, source: Path) -> bool:
    """Whether the name that a source gives its base, which may look like an id, is a folder here."""
    found = local_base(asked, source, explicit=False)
    return found is not None and found.is_dir()


def local_base(asked: str, source: Path, *, explicit: bool) -> Path | None:
    """The folder or file here that a base is named by: under the current folder, else under the source's parents.

    Those count only where the user did not name it (`explicit`). None where there is none.
    """
    try:
        path = Path(asked).expanduser()
        if path.exists():
            return path
        if explicit or path.is_absolute():
            return None
        return next((parent / path for parent in source.absolute().parents if (parent / path).exists()), None)
    except (OSError, RuntimeError):  # a name that is too long; a user who is unknown
        return None


def _from_hub(part: str, name: str, option: str, session: Session, *, weights: bool, cache: bool) -> Path:
    from llava_convert.storage.remote.reach import on_hub  # its clients take half a second to import

    address = parse(name)
    assert address is not None
    try:
        return on_hub(address, session, weights=weights, cache=cache)
    except HubError as problem:
        raise InputError(
            f"the base {PART_NAMES[part]} {name!r} was not found: it is not a folder here, not in the hub's cache, "
            f"and the hub gave an error ({problem.message})",
            hint=f"{FOLDER_HINT}{option} PATH",
        ) from problem
