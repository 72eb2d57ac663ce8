"""Sources and targets at URLs, by fsspec: s3://, https://, gs://, and whatever else it knows."""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from inspect import signature
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.registry import known_implementations

from llava_convert.core.errors import HubError, UsageError
from llava_convert.core.retry import FIRST_TRIES, patiently
from llava_convert.storage.hubs import errors
from llava_convert.storage.hubs.answers import MOST, require_plain, too_long
from llava_convert.storage.hubs.secrets import shown
from llava_convert.storage.remote.files import WEIGHTS, Remote

_PORTAL = "check the address, and the network, where a proxy or a login page may answer instead"
_INSTEAD = "download it, and name the local file"
_WEB = ("http", "https")
PART = 8 << 20
MOST_PARTS = 10_000  # S3's limit for one object
AT_ONCE = 4
_EXTRAS = {"s3": "s3", "s3a": "s3", "https": "https", "http": "https"}


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path there. Raises UsageError where a package is missing or none knows."""
    protocol = url.partition("://")[0]
    try:
        web = _bounded_answers() if protocol in _WEB else {}
        fs, path = fsspec.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **web)
    except ImportError as problem:
        extra = _EXTRAS.get(protocol)
        hint = f"pip install 'llava-convert[{extra}]'" if extra else known_implementations[protocol].get("err", "")
        raise UsageError(f"{shown(url)}: the package that reads {protocol}:// is not installed", hint=hint) from problem
    except ValueError as problem:
        raise UsageError(f"{shown(url)}: the protocol {protocol} is not known") from problem
    return fs, str(path)


def _bounded_answers() -> dict[str, Any]:
    """Settings of fsspec's web client by which an answer is neither unpacked nor longer than MOST bytes.

    The files of a model are read in parts, which are shorter.
    """
    import aiohttp

    class Bounded(aiohttp.ClientResponse):
        async def read(self) -> bytes:
            if self._body is None:
                require_plain(self.headers.get("Content-Encoding"))
                body = bytearray()
                async for piece in self.content.iter_any():
                    body += piece
                    if len(body) > MOST:
                        raise too_long()
                self._body = bytes(body)
            return await super().read()

    plain = {"headers": {"Accept-Encoding": "identity"}, "auto_decompress": False, "response_class": Bounded}
    return {"client_kwargs": plain}


def open(url: str) -> tuple[Remote, str]:
    """The folder at a URL, or the one that the file there lies in; and the file's name, or nothing.

    Raises HubError, and UsageError where a package is missing.
    """
    fs, path = file_system(url)
    where = shown(url)
    web = url.partition("://")[0] in _WEB

    def listing() -> tuple[str, dict[str, dict[str, Any]]]:
        with asking(where):
            return _on_the_web(fs, path) if web else _in_a_store(fs, path)

    file, found = patiently(where, listing, tries=FIRST_TRIES)
    if not any(found):
        raise HubError(f"{where}: the server lists no file there", hint=_PORTAL)
    if web and (pages := [name for name, one in found.items() if _is_page(name, one)]):
        raise HubError(f"{where}: the server answers with a web page in place of {pages[0]}", hint=_PORTAL)
    sizes = {name: one["size"] for name, one in found.items() if name and one.get("size") is not None}
    if untold := [name for name in found if name.lower().endswith((*WEIGHTS, ".json")) and name not in sizes]:
        raise HubError(f"{where}: the server does not say the size of {untold[0]}", hint=_INSTEAD)
    address = where.rpartition("/")[0] if file else where

    def read(name: str, start: int, end: int) -> bytes:
        with asking(f"{address}/{name}"):
            if web:
                return _part(fs, found[name], start, end)
            return bytes(fs.cat_file(found[name]["name"], start=start, end=end))

    def version(name: str) -> str:
        with asking(f"{address}/{name}"):
            return _version(fs.info(found[name]["name"]))

    return Remote(address, {name: int(size) for name, size in sizes.items()}, read, version), file


def matching(pattern: str) -> list[str]:
    """The addresses in a store that a pattern (`s3://runs/*/iter_*.pth`) is of. Raises HubError, UsageError."""
    fs, path = file_system(pattern)
    scheme = pattern.partition("://")[0]

    def ask() -> list[str]:
        with asking(shown(pattern)):
            return [f"{scheme}://{found}" for found in fs.glob(path)]

    return patiently(shown(pattern), ask, tries=FIRST_TRIES)


def read_small(url: str) -> bytes | None:
    """A small file in a store, None where there is none. Raises HubError, UsageError."""
    fs, path = file_system(url)

    def ask() -> bytes | None:
        with asking(shown(url)), suppress(FileNotFoundError):
            return bytes(fs.cat_file(path, start=0, end=MOST))
        return None

    return patiently(shown(url), ask, tries=FIRST_TRIES)


def write(url: str, data: bytes) -> None:
    """Write a small file in a store. Raises HubError, UsageError."""
    fs, path = file_system(url)

    def ask() -> None:
        with asking(shown(url)):
            fs.pipe_file(path, data)

    patiently(shown(url), ask, tries=FIRST_TRIES)


def version(url: str) -> str | None:
    """What a store calls the content of a file (S3: its ETag), None where there is no file. Raises HubError."""
    fs, path = file_system(url)

    def ask() -> str | None:
        with asking(shown(url)), suppress(FileNotFoundError):
            return str(fs.checksum(path))
        return None

    return patiently(shown(url), ask, tries=FIRST_TRIES)


def copies(url: str) -> bool:
    """Whether the store of a file can copy it, without sending its bytes here."""
    kind = type(file_system(url)[0])
    plain = fsspec.AbstractFileSystem.cp_file, AsyncFileSystem._cp_file
    return getattr(kind, "_cp_file", kind.cp_file) not in plain


def _on_the_web(fs: Any, url: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """A file by its suffix, and alone, since a web server need not list what is beside it; else the links of a page."""
    name = PurePosixPath(urlsplit(url).path).name
    if PurePosixPath(name).suffix.lower() in (*WEIGHTS, ".json"):
        return name, {name: dict(fs.info(url), name=url)}
    return "", {full[len(url) :].lstrip("/"): dict(fs.info(full), name=full) for full in fs.find(url)}


def in_parts(fs: Any, size: int) -> dict[str, int]:
    """How a file of `size` bytes is sent: what a file system of fsspec's takes of part size and parts at a time.

    s3fs by itself reads ten parts of 50 MB into memory, and a file below 100 MB whole.
    """
    wanted = {"chunksize": max(PART, -(-size // MOST_PARTS)), "max_concurrency": AT_ONCE}
    taken = signature(fs._put_file if isinstance(fs, AsyncFileSystem) else fs.put_file).parameters
    return {name: value for name, value in wanted.items() if name in taken}


def _is_page(name: str, one: dict[str, Any]) -> bool:
    """Whether a server says of a file of a model that it is HTML."""
    return name.lower().endswith((*WEIGHTS, ".json")) and one.get("mimetype") == "text/html"


def _in_a_store(fs: Any, path: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """A folder with all that is below it; of a file, what lies beside it."""
    if fs.info(path)["type"] == "directory":
        return "", {full[len(path) :].lstrip("/"): one for full, one in fs.find(path, detail=True).items()}
    folder, _, name = path.rpartition("/")
    return name, {PurePosixPath(one["name"]).name: one for one in fs.ls(folder, detail=True) if one["type"] == "file"}


def _part(fs: Any, one: dict[str, Any], start: int, end: int) -> bytes:
    """Bytes of a file on the web. `cat_file` would take all of it where the server knows no ranges; this stops."""
    with fs.open(one["name"], "rb", size=one["size"], block_size=end - start, cache_type="none") as stream:
        stream.seek(start)
        try:
            return bytes(stream.read(end - start))
        except ValueError:
            raise HubError(f"{shown(one['name'])}: the server does not give parts of files", hint=_INSTEAD) from None


def _version(info: dict[str, Any]) -> str:
    """What changes with a file's content, by the name that its store has for it."""
    return str(next((info[key] for key in ("ETag", "etag", "LastModified", "mtime", "created") if key in info), ""))


def asking(where: str) -> AbstractContextManager[None]:
    """Turn what a file system raises into HubError, or into TransientError where asking again may help."""
    return errors.asking(errors.Asked(where, "the server", "check the credentials in use"))
