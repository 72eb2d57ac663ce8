"""An output at a URL: each file is built here, sent and removed, so that the disk need hold one shard.

Nothing there appears under one name at one moment, as a folder does. A record of what was sent is written first and
taken away last, and config.json and the indexes come after the weights: what has a record, or lacks these, is not
finished. Each of several runs that share an output keeps a record of its own; the run that finishes reads them all.

Stores have no locks. The record of a run that has an output to itself says which run it is of: who begins there later
writes its own, and the earlier one stops at its next file and touches nothing any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from llava_convert.core.errors import HubError, InputError, Interrupted, OutputError, UsageError
from llava_convert.core.retry import FIRST_TRIES, patiently
from llava_convert.storage.fingerprints import Digest, State
from llava_convert.storage.hubs.secrets import shown
from llava_convert.storage.output.finished import MAX_RECORD_BYTES, RECORD, is_record, of_another_plan, refuse_missing
from llava_convert.storage.output.places import NO_ROOM, as_output_error
from llava_convert.storage.output.shared import share_token
from llava_convert.storage.output.staging import Twin
from llava_convert.storage.remote.files import Remote
from llava_convert.storage.remote.session import Session
from llava_convert.storage.remote.urls import asking, file_system, in_parts

_LAST = ("config.json", ".index.json")  # in this order, after everything else


class RemoteStaging:
    """What `storage.staging.Staging` is for a folder here; a context manager with the same verbs.

    `path` is where the output can be read back from: what was sent, by ranges. When the network fails, what was sent
    stays for `resume`; after any other failure it is removed. With `share` it writes those files alone, what it has
    sent stays however it ends, and it has no commit.

    Raises UsageError where nothing can be written, OutputError (exit 6) where something is there already, HubError.
    """

    def __init__(
        self,
        url: str,
        plan_hash: str,
        *,
        force: bool,
        resume: bool,
        needed_bytes: int,
        say: Callable[[str], None],
        share: Collection[str] | None = None,
        needs: Collection[str] = (),
    ) -> None:
        if force:
            raise UsageError(
                f"--force cannot replace {shown(url)}: the old output would not survive a failure",
                hint="delete it there, or name another place with -o",
            )
        if urlsplit(url).scheme in ("http", "https"):
            raise UsageError(
                f"{shown(url)}: the web can be read but not written", hint="name a folder or a store (s3://…)"
            )
        self.out = shown(url)
        self._fs, self._root = file_system(url)
        self._plan_hash, self._resume, self._needed, self._say = plan_hash, resume, needed_bytes, say
        self._share, self._needs = share, needs
        self._run = share_token()
        self._record = RECORD if share is None else f"{RECORD}-{self._run}"
        self._recorded = False
        self._sent: dict[str, dict[str, Any]] = {}
        self._found: dict[str, Mapping[str, Any]] = {}
        self._small: dict[str, bytes] = {}
        self._begun: tuple[str, ...] = ()
        self._committed = self._taken = False

    def __enter__(self) -> RemoteStaging:
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if free < self._needed:
            raise OutputError(
                f"{tempfile.gettempdir()} needs {self._needed:,} bytes for what is built before it is sent, and has "
                f"{free:,} free",
                hint=f"{NO_ROOM}, or name another place by TMPDIR; --max-shard-size makes shards smaller",
            )
        self._take_leftover(self._listing())
        with contextlib.ExitStack() as undo:
            session = undo.enter_context(Session())
            self._mount = session.mount(Remote(self.out, {}, self._read, lambda name: ""))
            self.path = self._mount.root
            self._temporary = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="llava-convert-")))
            for name, sent in self._sent.items():
                self._mount.place(name, sent["size"])
            self._write_record()
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        state = "is complete"
        try:
            if not self._committed:
                state = "holds what was sent, and is not finished"
                if self._taken:
                    state = "is written by another run"
                elif self._share is not None or self._needs:
                    with contextlib.suppress(HubError):
                        self._remove(self._begun)
                elif isinstance(problem, HubError):
                    self._say(f"what was sent stays at {self.out}: the same command with --resume goes on from there")
                else:
                    with contextlib.suppress(HubError):
                        self._remove([*self._sent, *self._begun, *self._small, *self._records()])
                        state = "holds nothing of it"
        finally:
            self._undo.__exit__(kind, problem, trace)
        if isinstance(problem, KeyboardInterrupt):
            raise Interrupted(f"interrupted; {self.out} {state}") from problem

    @property
    def found(self) -> Mapping[str, Mapping[str, Any]]:
        return self._found

    def tell(self, name: str, found: Mapping[str, Any]) -> None:
        """Keep what was found out about a file, for a later run of the same plan."""
        self._found[name] = found
        if name in self._sent:
            self._write_record()

    def settle(self) -> None:
        """What is sent is in the record already."""

    def finished(self, name: str) -> bool:
        """Whether `name` was sent whole: by this run, or by an earlier one of the same plan."""
        return name in self._sent

    @contextlib.contextmanager
    def new_file(self, name: str, size: int) -> Iterator[int]:
        """A descriptor for writing `name`, which is sent when the block ends well. Raises OutputError and HubError."""
        local = self._temporary / name.replace("/", "__")
        try:
            with local.open("w+b") as stream:
                stream.truncate(size)
                yield stream.fileno()
        except OSError as problem:
            if problem.filename not in (None, str(local)):
                raise
            raise as_output_error(problem, local) from problem
        with local.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        self._write_record(name)
        self._put(local, name)
        local.unlink()
        self._note(name, size, digest)

    def adopt(self, name: str, twin: Twin) -> None:
        """Have the store copy a file of its own to `name`: no byte of it comes here.

        Raises HubError, and InputError where the file is another by now.
        """
        _, source = file_system(twin.place)
        self._write_record(name)
        where = f"{self.out}/{name}"

        def copy() -> None:
            with asking(where):
                self._fs.makedirs(os.path.dirname(self._at(name)), exist_ok=True)  # noqa: PTH120  # no path of here
                self._fs.cp_file(source, self._at(name))
                if str(self._fs.checksum(source)) != twin.digest.state.version:
                    raise InputError(
                        f"{shown(twin.place)}: changed while it was copied", hint="run the same command again"
                    )

        patiently(where, copy, tries=FIRST_TRIES)
        self._note(name, twin.digest.state.size, twin.digest.sha256)

    def write_bytes(self, name: str, data: bytes) -> None:
        """A small file, which `commit` sends."""
        self._small[name] = data
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    def digests(self, names: Iterable[str]) -> dict[str, Digest]:
        """Digests of files, as they were sent."""
        small = {n: Digest(hashlib.sha256(d).hexdigest(), State(len(d))) for n, d in self._small.items()}
        return {name: (self.known | small)[name] for name in sorted(names)}

    @property
    def known(self) -> dict[str, Digest]:
        """The digests of the files that were sent."""
        return {n: Digest(s["sha256"], State(s["size"], version=s["version"])) for n, s in self._sent.items()}

    def commit(self) -> None:
        """Send the small files, those last that make it a model; then compare what is there. Raises HubError."""
        self._write_record(*self._small)
        for name in sorted(
            self._small, key=lambda n: next((i for i, end in enumerate(_LAST, 1) if n.endswith(end)), 0)
        ):
            self._put(self.path / name, name)
        there = self._listing()
        wanted = {n: sent["size"] for n, sent in self._sent.items()} | {n: len(d) for n, d in self._small.items()}
        wrong = [name for name, size in wanted.items() if there.get(name) != size]
        if wrong:
            raise HubError(f"{self.out}: {len(wrong)} files did not arrive whole, among them {wrong[0]}")
        self._require_own()
        self._remove(self._records())
        self._committed = True

    def _take_leftover(self, there: dict[str, int]) -> None:
        if not there:
            refuse_missing(self._needs, ())
            return
        records = sorted(filter(is_record, there))
        if not records:
            raise OutputError(f"{self.out} exists ({len(there)} files)", hint="name another place with -o")
        plans: set[str] = set()
        sent: dict[str, dict[str, Any]] = {}
        begun: set[str] = set()
        for record in records:
            # Whole, whatever its size was in the listing: another share may have written more of it since.
            read = partial(self._read, record, 0, MAX_RECORD_BYTES)
            data = patiently(self.out, read)
            plan, files, next_ones = _read_record(data)
            plans.add(plan)
            sent |= files
            begun.update(next_ones)
        if (self._share is not None or self._needs) and plans != {self._plan_hash}:
            raise of_another_plan(self.out)
        if self._share is not None or (self._resume and plans == {self._plan_hash}):
            mine = {name: one for name, one in sent.items() if self._share is None or name in self._share}
            same = {name: one for name, one in mine.items() if there.get(name) == one["size"]}
            self._sent = {name: one for name, one in same.items() if self._version(name) == one["version"]}
            self._found = {name: one["found"] for name, one in self._sent.items()}
            refuse_missing(self._needs, self._sent)
            sizes = sum(one["size"] for one in self._sent.values())
            if self._sent or self._share is None:
                resuming = "" if self._share is not None else "resuming: "
                self._say(f"{resuming}{len(self._sent)} files are there already, {sizes:,} bytes")
            return
        why = "it is of another plan" if self._resume else "--resume would keep what was sent"
        self._say(f"removing what an unfinished run left at {self.out} ({why})")
        self._remove([name for name in there if name in sent or name in begun])
        if left := self._listing().keys() - {*records}:
            raise OutputError(f"{self.out} exists ({len(left)} files)", hint="name another place with -o")
        self._remove(records)

    def _note(self, name: str, size: int, sha256: str) -> None:
        """Count a file as sent."""
        self._sent[name] = {"size": size, "sha256": sha256, "version": self._version(name)}
        self._mount.place(name, size)
        self._write_record()

    def _records(self) -> list[str]:
        return sorted(filter(is_record, self._listing()))

    def _write_record(self, *begun: str) -> None:
        """What was sent whole, and what is sent next: whatever is there of either is ours."""
        if self._share is not None and self._recorded and self._record not in self._listing():
            raise OutputError(
                f"{self.out} was finished or removed while this share was written", hint="see what is there"
            )
        if self._share is None and self._recorded:
            self._require_own()
        self._begun = begun
        files = {name: {**one, "found": self._found.get(name, {})} for name, one in self._sent.items()}
        data = json.dumps({"plan": self._plan_hash, "run": self._run, "files": files, "begun": begun}).encode()
        local = self._temporary / "record"
        local.write_bytes(data)
        self._put(local, self._record)
        self._recorded = True

    def _require_own(self) -> None:
        """Raise OutputError where another run has begun here since."""

        def ask() -> bytes:
            with asking(self.out), contextlib.suppress(FileNotFoundError):
                return bytes(self._fs.cat_file(self._at(self._record), start=0, end=MAX_RECORD_BYTES))
            return b""

        if _run_of(patiently(self.out, ask)) == self._run:
            return
        self._taken = True
        raise OutputError(
            f"{self.out} is in use by another run, which began after this one",
            hint="wait for it, or name another place with -o; runs that are to share it take --files I/N",
        )

    # --- the store

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _listing(self) -> dict[str, int]:
        def ask() -> dict[str, int]:
            with asking(self.out), contextlib.suppress(FileNotFoundError):
                found = self._fs.find(self._root, detail=True)
                names = {full: full[len(self._root) :].lstrip("/") for full in found}
                return {name: int(found[full]["size"]) for full, name in names.items() if name}
            return {}

        return patiently(self.out, ask)

    def _read(self, name: str, start: int, end: int) -> bytes:
        with asking(f"{self.out}/{name}"):
            return bytes(self._fs.cat_file(self._at(name), start=start, end=end))

    def _put(self, local: Path, name: str) -> None:
        where = f"{self.out}/{name}"

        def send() -> None:
            with asking(where):
                self._fs.makedirs(os.path.dirname(self._at(name)), exist_ok=True)  # noqa: PTH120  # no path of here
                self._fs.put_file(str(local), self._at(name), **in_parts(self._fs, local.stat().st_size))

        patiently(where, send, tries=FIRST_TRIES)  # the clients of stores repeat by themselves, too

    def _version(self, name: str) -> str:
        """What the store calls this content of a file (S3: its ETag): equal only while nobody writes it again."""

        def ask() -> str:
            with asking(f"{self.out}/{name}"):
                return str(self._fs.checksum(self._at(name)))

        return patiently(f"{self.out}/{name}", ask)

    def _remove(self, names: Iterable[str]) -> None:
        for name in dict.fromkeys(names):
            patiently(self.out, lambda name=name: self._remove_one(name))  # type: ignore[misc]

    def _remove_one(self, name: str) -> None:
        with asking(self.out), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))


def _run_of(data: bytes) -> str | None:
    """Which run wrote a record; None of what is no record of ours."""
    try:
        return str(json.loads(data)["run"])
    except (ValueError, TypeError, KeyError):
        return None


def _read_record(data: bytes) -> tuple[str, dict[str, dict[str, Any]], list[str]]:
    """The plan, the files that were sent whole, and those that were begun; of what is no record of ours, nothing."""
    try:
        found = json.loads(data)
        files = {
            str(name): {
                "size": int(one["size"]),
                "sha256": str(one["sha256"]),
                "version": str(one["version"]),
                "found": dict(one["found"]),
            }
            for name, one in found["files"].items()
        }
        return str(found["plan"]), files, [str(name) for name in found["begun"]]
    except (ValueError, TypeError, KeyError, AttributeError):
        return "", {}, []
