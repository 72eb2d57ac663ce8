"""What is known of where a model comes from: base models, license, data. Nothing is guessed."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from llava_convert.app.card.facts import Facts
from llava_convert.core.errors import ConvertError
from llava_convert.core.hub_names import is_id
from llava_convert.core.resources import data_dir
from llava_convert.core.values import dataclass
from llava_convert.model.checkpoint import LLM
from llava_convert.storage.remote.mounts import mounted
from llava_convert.storage.remote.origin import published
from llava_convert.storage.sidecars import Sidecars

# Meta's cards carry the license's text in their front matter: 40 kB.
_MOST_FRONT_MATTER = 256 * 1024
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}|multilingual")


@dataclass(frozen=True)
class License:
    """`id` in the hub's words; `where` tells whose it is."""

    id: str
    where: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Origin:
    """`source` is the hub id of the model that was converted, where it is one of a hub's."""

    source: str | None
    bases: tuple[str, ...]
    license: License | None
    datasets: tuple[str, ...]
    languages: tuple[str, ...]


def origin(facts: Facts) -> Origin:
    """What the source's own card, its training config and its base models tell."""
    checkpoint = facts.model.checkpoint
    beside = checkpoint.beside if checkpoint.path.is_dir() else None
    own = _front_matter(beside) if beside is not None and facts.source.has_card else {}
    source = _published(checkpoint.root) if facts.source.has_card else None
    paths = checkpoint.training.data_paths if checkpoint.training is not None else ()
    datasets = {*datasets_of(paths), *(i for i in _texts(own.get("datasets")) if is_id(i))}
    return Origin(
        source=source,
        bases=facts.base_ids,
        license=_license(facts, own, source),
        datasets=tuple(sorted(datasets)),
        languages=tuple(i for i in _texts(own.get("language")) if _LANGUAGE.fullmatch(i)),
    )


def _published(folder: Path) -> str | None:
    """The id on the Hub; one of ModelScope names nothing there, or something else."""
    remote = mounted(folder)
    foreign = remote is not None and not remote.address.startswith("hf://")
    return None if foreign else published(folder).get("repo")


def datasets_of(paths: Iterable[str]) -> tuple[str, ...]:
    """The hub's data sets that paths of training data lie in, by whole parts of the path."""
    parts = {part for path in paths for part in PurePosixPath(path.replace("\\", "/")).parts}
    return tuple(name for name, names in _datasets().items() if parts & names)


@cache
def _datasets() -> Mapping[str, frozenset[str]]:
    raw = tomllib.loads((data_dir("mappings") / "datasets.toml").read_text(encoding="utf-8"))
    return {name: frozenset(row["names"]) for name, row in raw.items()}


@cache
def _licenses() -> Mapping[str, dict[str, str]]:
    return tomllib.loads((data_dir("mappings") / "licenses.toml").read_text(encoding="utf-8"))


def _license(facts: Facts, own: Mapping[str, Any], source: str | None) -> License | None:
    """The source's, else the language model's: its weights are the largest part, and the tower's are few."""
    found = _stated(own, "the license of the converted model", source)
    if found is not None or (facts.alone is not None and facts.alone != LLM):
        return found
    base, name = facts.model.bases.get(LLM), facts.base_id(LLM)
    whose = f"the license of the language model {name}" if name else "the license of the language model"
    if base is not None:
        found = _stated(_front_matter(base.files), whose, name)
    return found or _stated(_licenses().get(name or "", {}), whose, name)


def _stated(card: Mapping[str, Any], whose: str, repo: str | None) -> License | None:
    """What a card's front matter says, where it is in the form that the hub knows."""
    given, name, link = (card.get(key) for key in ("license", "license_name", "license_link"))
    if not isinstance(given, str) or not _LICENSE_ID.fullmatch(given):
        return None
    if isinstance(link, str) and repo is not None and re.fullmatch(r"[\w.-]+", link):
        link = f"https://huggingface.co/{repo}/blob/main/{link}"  # the file's name, in its own repository
    return License(
        given,
        whose,
        name if isinstance(name, str) and _LICENSE_ID.fullmatch(name) else None,
        link if isinstance(link, str) and re.fullmatch(r"https?://[\w.~:/?#@&=+%,;-]+", link) else None,
    )


def _front_matter(files: Sidecars) -> Mapping[str, Any]:
    """The metadata of a folder's model card, {} where it has none that can be read."""
    try:
        text = files.read("README.md").decode(errors="replace") if files.has("README.md") else ""
    except (OSError, ConvertError):
        return {}
    found = re.match(r"---[ \t]*\r?\n(.*?\n)---[ \t]*(?:\r?\n|$)", text[:_MOST_FRONT_MATTER], re.DOTALL)
    return _parsed(found[1]) if found else {}


def _parsed(text: str) -> Mapping[str, Any]:
    import yaml  # most sources have no card

    try:
        # No scalar becomes anything but the text that it is: tags ask for nothing, `no` is a language.
        found = yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, str))
