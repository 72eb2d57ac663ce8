"""Which GGUF files make one model: a language model, and the mmproj (tower and projector) that lies beside it.

Nothing in either file names the other, so what lies together counts, and then the names: llama.cpp's and the published
ones say `mmproj` and the type (`NAME-q4_k_m.gguf`, `NAME-mmproj-f16.gguf`, `mmproj-NAME-f16.gguf`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from llava_convert.core.errors import InputError, UnsafeError, UnsupportedError
from llava_convert.core.text import listed, printable
from llava_convert.core.values import dataclass
from llava_convert.layouts.gguf.ollama import files_of, is_blob, is_manifest, projector_of
from llava_convert.storage.files import require_inside
from llava_convert.storage.headers import Headers

SUFFIX = ".gguf"
MAGIC = b"GGUF"
ARCHITECTURE = "general.architecture"
VISION_ARCHITECTURE = "clip"

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
# What a file's name says beside the model's: its role and its type.
_TYPES = r"mmproj-stock|mmproj|bf16|f16|f32|fp16|fp32|int4|int8|mxfp4|tq[12]_0|i?q[1-8](?:_(?:[ksmlx01]|xs|xxs|nl|xl))*"
_NOT_OF_THE_MODEL = re.compile(rf"(?:^|[-_.])(?:{_TYPES})(?=[-_.]|$)")
# The first key, which both writers make the architecture: magic, version, two counts, then a string's length and text,
# the value's type, and the value, a string again (ggml, docs/gguf.md).
_FIRST_KEY = len(ARCHITECTURE).to_bytes(8, "little") + ARCHITECTURE.encode() + (8).to_bytes(4, "little")


@dataclass(frozen=True)
class Files:
    """The files of one model. Of a split file, its first."""

    llm: Path | None
    mmproj: Path | None

    @property
    def path(self) -> Path:
        """The file that the model is named by."""
        found = self.llm or self.mmproj
        assert found is not None
        return found


def starts_as_gguf(path: Path, headers: Headers) -> bool:
    return headers.start(path).startswith(MAGIC)


def architecture_of(path: Path, headers: Headers) -> str:
    """`general.architecture` of a file, "" where there is none. Raises what reading the header raises.

    Of almost every file the first bytes tell it, so that a folder of many types is looked through quickly.
    """
    head = headers.start(path)
    rest = head[24:].removeprefix(_FIRST_KEY)
    if head.startswith(MAGIC + (3).to_bytes(4, "little")) and len(rest) < len(head) - 24:
        size = int.from_bytes(rest[:8], "little")
        if size <= len(rest) - 8:
            return rest[8 : 8 + size].decode("utf-8", "replace")
    value = headers.gguf(path).metadata.get(ARCHITECTURE)
    return str(value.value) if value is not None else ""


def find(path: Path, headers: Headers, mmproj: Path | None = None) -> Files:
    """The one model at `path`: a file, a folder, or a manifest of Ollama. `mmproj` is the second file, if it is named.

    Raises UnsupportedError (exit 4) naming the files where there are several, or none, and for an `mmproj` that is
    something else; what reading a header raises.
    """
    if mmproj is not None:
        return _with(path, mmproj, headers)
    if path.is_dir():
        llms, mmprojs = _sorted_out(_files_in(path), headers)
        if len(llms) > 1:
            raise _ambiguous(path, llms, "language models, or several types of one", llms[0])
        if llms:
            return Files(llms[0], _beside(llms[0], mmprojs))
        if len(mmprojs) != 1:
            raise _ambiguous(path, mmprojs, "vision towers (mmproj)", mmprojs[0] if mmprojs else None)
        return Files(None, mmprojs[0])
    if is_manifest(path, headers):
        return Files(*files_of(path))
    path = _first_of(path)
    if architecture_of(path, headers) == VISION_ARCHITECTURE:
        return Files(None, path)
    if is_blob(path):
        return Files(path, projector_of(path))
    others = [other for other in _files_in(path.parent) if other != path and _may_be_mmproj(other, headers)]
    return Files(path, _beside(path, others))


def _with(path: Path, mmproj: Path, headers: Headers) -> Files:
    """The language model at `path` and the mmproj that is named."""
    if not mmproj.is_file() or architecture_of(mmproj, headers) != VISION_ARCHITECTURE:
        raise UnsupportedError(
            f"{printable(mmproj)} is not an mmproj (a GGUF with {ARCHITECTURE} = {VISION_ARCHITECTURE})",
            hint="give the file with vision tower and projector by --mmproj",
        )
    if path.is_dir():
        llms = _sorted_out(_files_in(path), headers)[0]
        if len(llms) != 1:
            raise _ambiguous(path, llms, "language models, or several types of one", llms[0] if llms else None)
        return Files(llms[0], mmproj)
    llm = files_of(path)[0] if is_manifest(path, headers) else _first_of(path)
    if architecture_of(llm, headers) == VISION_ARCHITECTURE:
        raise UnsupportedError(
            f"{printable(llm)} is an mmproj itself", hint="give the language model as the source, and --mmproj"
        )
    return Files(llm, mmproj)


def find_all(path: Path, headers: Headers) -> list[Files]:
    """Every model at `path`; of a folder with several types of one model each file once, together as far as it goes."""
    if not path.is_dir():
        return [find(path, headers)]
    llms, mmprojs = _sorted_out(_files_in(path), headers)
    if not llms and not mmprojs:
        return [find(path, headers)]
    count = max(len(llms), len(mmprojs))
    padded = ([*files, *[None] * (count - len(files))] for files in (llms, mmprojs))
    return [Files(llm, mmproj) for llm, mmproj in zip(*padded, strict=True)]


def _files_in(folder: Path) -> list[Path]:
    """The GGUF files of a folder, a split one by its first part that is there."""
    found: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() == SUFFIX):
        part = _SPLIT.fullmatch(path.name)
        found.setdefault(part[1] if part else path.name, path)
    return list(found.values())


def _first_of(path: Path) -> Path:
    """The part of a split file which holds the metadata, where it is there."""
    part = _SPLIT.fullmatch(path.name)
    first = path.with_name(f"{part[1]}-00001-of-{part[3]}{path.suffix}") if part else path
    return first if first.is_file() else path


def _sorted_out(paths: Iterable[Path], headers: Headers) -> tuple[list[Path], list[Path]]:
    llms: list[Path] = []
    mmprojs: list[Path] = []
    for path in paths:
        require_inside(path.parent, path.name)
        (mmprojs if architecture_of(path, headers) == VISION_ARCHITECTURE else llms).append(path)
    return llms, mmprojs


def _may_be_mmproj(path: Path, headers: Headers) -> bool:
    """Whether a file beside a language model is an mmproj.

    One that is broken, or a link out of the folder, only counts when it is called so.
    """
    try:
        require_inside(path.parent, path.name)
        return architecture_of(path, headers) == VISION_ARCHITECTURE
    except (InputError, UnsafeError, UnsupportedError):
        if "mmproj" in path.name.lower():
            raise
        return False


def _beside(llm: Path, mmprojs: list[Path]) -> Path | None:
    """The mmproj of a language model: the only one there, else the one whose name is the model's."""
    if len(mmprojs) < 2:
        return mmprojs[0] if mmprojs else None
    alike = [path for path in mmprojs if stem_of(path) == stem_of(llm)]
    if len(alike) == 1:
        return alike[0]
    raise UnsupportedError(
        f"{printable(llm)}: it is not clear which mmproj belongs to it: {listed([p.name for p in alike or mmprojs])}",
        hint="name it by --mmproj",
    )


def stem_of(path: Path) -> str:
    """What of a file's name is the model's."""
    part = _SPLIT.fullmatch(path.name)
    name = (part[1] if part else path.stem).lower()
    return _NOT_OF_THE_MODEL.sub("", name).strip("-_.")


def _ambiguous(folder: Path, paths: list[Path], what: str, first: Path | None) -> UnsupportedError:
    if not paths:
        return UnsupportedError(f"{printable(folder)}: no GGUF file in it")
    return UnsupportedError(
        f"{printable(folder)}: {len(paths)} {what}: {listed([p.name for p in paths])}",
        hint=f"name the file: {printable(first)}",
    )
