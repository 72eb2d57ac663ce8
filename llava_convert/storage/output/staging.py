"""An output that appears whole or not at all.

It is built in `.<OUT>.partial` beside OUT, made durable, and put in OUT's place by one rename. Both lie in one folder,
so the rename cannot cross devices (an overlay or a mount point at OUT can still refuse it: exit 6, the old OUT kept).
A lock beside them, `.<OUT>.partial.lock`, keeps a second process away: inside, it would vanish with a discarded
leftover while another process waits on it. Every way out but SIGKILL and power loss removes both.

A symbolic link at OUT is an output that exists; `force` replaces the link and never touches what it points to.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import sys
import threading
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal, Protocol

from llava_convert.core.errors import InputError, Interrupted, OutputError
from llava_convert.core.values import dataclass
from llava_convert.storage.fingerprints import Digest, digests
from llava_convert.storage.output.finished import RECORD, FinishedFiles, OtherPlanError, of_another_plan, refuse_missing
from llava_convert.storage.output.locks import Lock
from llava_convert.storage.output.own_files import create_own
from llava_convert.storage.output.places import NO_ROOM, as_output_error, check_name, place, refuse_overlap
from llava_convert.storage.output.signals import Terminated, fail_beyond_size_limit, interrupt_on_sigterm, uninterrupted
from llava_convert.storage.ranges import FilePool, write_all

__all__ = [
    "RECORD", "UNFINISHED", "Staging", "Terminated", "Twin", "as_output_error", "check_name", "interrupt_on_sigterm",
]  # fmt: skip

UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Twin:
    """A file that holds what one of an output will: where, and what it was when that was known."""

    place: str  # a path, or the URL of a file in the store that the output goes to
    digest: Digest


class Stage(Protocol):
    """What an output is built on, wherever it goes.

    `found` is what runs of the same plan found out about finished files, by name, as they told it.
    """

    @property
    def found(self) -> Mapping[str, Mapping[str, Any]]: ...

    def tell(self, name: str, found: Mapping[str, Any]) -> None: ...

    def finished(self, name: str) -> bool: ...

    def new_file(self, name: str, size: int) -> AbstractContextManager[int]: ...

    def write_bytes(self, name: str, data: bytes) -> None: ...

    def adopt(self, name: str, twin: Twin) -> None: ...


class Staging:
    """An output under construction; a context manager.

    `commit` puts it in OUT's place; leaving the block without it removes every trace. A signal to end that comes too
    late for that is raised at the block's end, and says that OUT is complete (Interrupted). `plan_hash` says what is
    being built, so that `resume` can keep what a killed run of the same plan had finished. `reads` are the sources.
    `warn` hears of what stays behind and of what may be lost, `say` of the rest.
    `needs` are files that earlier runs must have finished: it refuses to begin without, and what is there stays in any
    case. `share` sets the names of this run apart from those of others that build there (`SharedStaging`). `sha256`
    says that `digests` will be asked for.
    A `kind="file"` output is the one staged file which carries OUT's name. Missing parents of OUT are created, and
    removed again on failure.

    Raises UsageError (OUT is no usable name, or overlaps a source) and OutputError (OUT exists, is in use, cannot be
    created, or has less than `needed_bytes` of room) on entering; nothing has been written then.
    """

    def __init__(
        self,
        out: Path,
        plan_hash: str,
        *,
        force: bool,
        resume: bool,
        needed_bytes: int,
        reads: Iterable[Path] = (),
        say: Callable[[str], None],
        warn: Callable[[str], None] | None = None,
        kind: Literal["folder", "file"] = "folder",
        share: str | None = None,
        sha256: bool = False,
        needs: Collection[str] = (),
    ) -> None:
        self.out = place(out)
        self.path = self.out.with_name(f".{self.out.name}.partial")
        self._aside = self.out.with_name(f".{self.out.name}.old")
        self._force, self._resume, self._kind = force, resume, kind
        self._needed, self._reads, self._say, self._warn = needed_bytes, tuple(reads), say, warn or say
        self._mutex = threading.Lock()
        self._finished: dict[str, int] = {}
        self._names: dict[str, str] = {}  # as a case-insensitive file system sees them -> as given
        self._loose: set[Path] = set()  # small files, whose fsync waits for commit
        self._open: set[int] = set()
        self._share, self._needs = share, needs
        self._unfinished = UNFINISHED if share is None else f"{UNFINISHED}-{share}"
        self._record = FinishedFiles(self.path, plan_hash, share, sha256=sha256)
        self._lock: Lock | None = None
        self._made: list[Path] = []
        self._owned = self._committed = self._lost = self._taken_over = False

    def __enter__(self) -> Staging:
        refuse_overlap([self.out, self.path, self._aside], self._reads)
        try:
            self._refuse_existing()
            for folder in reversed([p for p in self.out.parents if not p.exists()]):
                folder.mkdir()
                self._made.append(folder)
            with uninterrupted():  # a lock taken but not yet ours to release would stay
                lock = self.path.with_name(self.path.name + ".lock")
                self._lock = Lock(lock, self.out, self._warn, shared=self._share is not None)
            self._recover(self._lock)
            self._refuse_existing()  # again, now that nobody else can make it
            self._take_leftover()
            free, needed = shutil.disk_usage(self.out.parent).free, self._needed - sum(self._finished.values())
            if free < needed:
                message = f"{self.out} needs {needed:,} bytes, {self.out.parent} has {free:,} free"
                raise OutputError(message, hint=NO_ROOM)
            self._start()
        except OSError as exc:
            self._clean()
            raise as_output_error(exc, self.out) from exc
        except BaseException as problem:
            self._clean()
            if isinstance(problem, KeyboardInterrupt):
                raise self._interrupted() from problem
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = exc if isinstance(exc, KeyboardInterrupt) else None
        try:
            with uninterrupted():
                self._clean()
        except KeyboardInterrupt as late:
            stopped = late
        if stopped is not None:
            raise self._interrupted() from stopped
        name = self._name_of(exc)
        if isinstance(exc, OSError) and name is not None:
            raise as_output_error(exc, self.out / name) from exc
        if isinstance(exc, InputError) and name is not None:
            hint = "something else changes what is built there, or the disk fails: choose another place with -o"
            raise OutputError(
                f"{self.out / name} cannot be read again while it is built: {exc.message}", hint=hint
            ) from exc

    @property
    def found(self) -> Mapping[str, Mapping[str, Any]]:
        return self._record.found

    def tell(self, name: str, found: Mapping[str, Any]) -> None:
        """Keep what was found out about a file, for a later run of the same plan."""
        self._record.tell(name, found)

    def finished(self, name: str) -> bool:
        """Whether `name` is whole and durable: written by this run, or kept from a killed one of the same plan."""
        return name in self._finished

    @contextlib.contextmanager
    def new_file(self, name: str, size: int | None = None) -> Iterator[int]:
        """A descriptor for writing `name` (folders by "/"), durable and `finished` when the block ends well.

        Threads may share it for `pwrite`; they must be done with it when the block ends well. When the block fails it
        stays open until the staging ends, so that a thread still writing cannot hit another file under a reused number.
        Raises OutputError when the file cannot be written.
        """
        target = self._claim(name)
        unfinished = target.with_name(target.name + self._unfinished)
        with self._writing(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            fd = create_own(unfinished)
            self._open.add(fd)
            if size is not None:
                os.ftruncate(fd, size)
            yield fd
            length = os.fstat(fd).st_size
            if size is not None and length != size:
                raise RuntimeError(f"{name} was planned with {size} bytes and has {length}")
            os.fsync(fd)
            self._open.discard(fd)
            os.close(fd)
            unfinished.replace(target)
            self._record.add(name, length)
            with self._mutex:
                self._finished[name] = length

    def adopt(self, name: str, twin: Twin) -> None:
        """Make `name` a copy of another file. Raises OutputError, and InputError where that is another by now."""
        place, size = Path(twin.place), twin.digest.state.size
        with FilePool() as pool, self.new_file(name, size) as fd:
            pool.copy_to(place, 0, fd, 0, size, progress=lambda done: None)
            twin.digest.require(place)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file; `commit` makes it durable, hence a resumed run writes it again. Raises OutputError."""
        target = self._claim(name)
        with self._writing(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished = target.with_name(target.name + UNFINISHED)
            fd = create_own(unfinished)
            try:
                write_all(fd, 0, data)
            finally:
                os.close(fd)
            unfinished.replace(target)
            self._loose.add(target)

    def digests(self, names: Iterable[str]) -> dict[str, Digest]:
        """Digests of staged files; with `sha256` the finished ones have theirs. Raises InputError, OutputError."""
        self.settle()
        return digests(self.path, names, self.known)

    @property
    def known(self) -> dict[str, Digest]:
        """Those that are made already."""
        return self._record.sha256()

    def settle(self) -> None:
        """Wait until what is finished is in the record. Raises OutputError."""
        with self._writing(""):
            self._record.wait()

    def commit(self) -> None:
        """Make everything durable and put it in OUT's place. Raises OutputError; what was at OUT is then still there.

        The caller writes index files and config.json after the shards.
        """
        if self._open:
            raise RuntimeError("commit with unfinished files")
        with self._writing(""):
            for name, size in self._finished.items():
                if (self.path / name).stat().st_size != size:
                    raise OutputError(f"{self.out / name} was changed while it was built", hint="run it again")
            with ThreadPoolExecutor(8) as pool:  # together they share the file system's journal commits
                list(pool.map(_sync, self._loose))
            self._record.close()
            (self.path / RECORD).unlink()
            for folder, _, _ in os.walk(self.path):
                _sync(Path(folder))
            with uninterrupted():
                self._put_in_place(self.path / self.out.name if self._kind == "file" else self.path)

    def _refuse_existing(self) -> None:
        try:
            mode = os.lstat(self.out).st_mode
        except FileNotFoundError:
            return
        if not self._force:
            what = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "a file"
            mend = "replace it with --force, or name another place with -o"
            raise OutputError(f"{self.out} exists ({what})", hint=mend)

    def _recover(self, lock: Lock) -> None:
        """Undo what a crash between the two renames of `_put_in_place` left; without its mark `.old` is not ours."""
        if lock.aside and os.path.lexists(self._aside):
            if os.path.lexists(self.out):
                _remove(self._aside)
            else:
                self._aside.rename(self.out)
                self._say(f"{self.out} restored: a run was killed while it replaced it")
        lock.record(aside=False)

    def _take_leftover(self) -> None:
        if not os.path.lexists(self.path):
            refuse_missing(self._needs, ())
            return
        why = "--resume would keep its finished files"
        if self._resume:
            with contextlib.suppress(OtherPlanError):
                self._finished, self._taken_over = self._record.take_over(), True
                refuse_missing(self._needs, self._finished)
                kept, what = self._finished, "finishing" if self._needs else "resuming"
                self._say(f"{what}: {len(kept)} finished files kept, {sum(kept.values()):,} bytes")
                return
            if self._needs:
                raise of_another_plan(self.path)
            why = "it belongs to another plan"
        self._say(f"discarding {self.path}, left by a killed run ({why})")
        _remove(self.path)

    def _start(self) -> None:
        self._owned = True
        if not self._taken_over:
            self.path.mkdir()
        self._record.start()
        fail_beyond_size_limit()

    def _interrupted(self) -> Interrupted:
        left = f"what was written stays in {self.path}" if self._needs else "nothing was left behind"
        state = f"{self.out} is complete" if self._committed else left
        return Interrupted(f"interrupted; {state}")

    def _claim(self, name: str) -> Path:
        pure = PurePosixPath(name)
        if str(pure) != name or pure.is_absolute() or not pure.name or {"..", RECORD} & {*pure.parts} or "\0" in name:
            raise ValueError(f"{name!r} is not a name for a file inside an output")
        for part in pure.parts:
            check_name(part)
        with self._mutex:
            other = self._names.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
            self._finished.pop(name, None)
        if other != name:
            raise OutputError(f"{other!r} and {name!r} are one file where case does not count")
        return self.path / name

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Turn the OSError of a write into OutputError; one that names a file outside of staging is somebody else's."""
        try:
            yield
        except OSError as exc:
            if exc.filename is not None and self._name_of(exc) is None:
                raise
            raise as_output_error(exc, self.out / name) from exc

    def _name_of(self, problem: BaseException | None) -> str | None:
        """Which file of the output a problem is about, by its name there; None where it is of another."""
        path = problem.unread if isinstance(problem, InputError) else getattr(problem, "filename", None)
        if path is None:
            return None
        path = Path(os.fsdecode(path))
        if path.is_relative_to(self.path):
            name = path.relative_to(self.path).as_posix().removesuffix(self._unfinished)
            return "" if name == "." else name
        return "" if path in (self.out, self._aside, self.out.parent) else None

    def _put_in_place(self, new: Path) -> None:
        assert self._lock is not None
        self._refuse_existing()
        replaces = os.path.lexists(self.out)
        if replaces and self.out.is_symlink():
            self._say(f"{self.out} is a link to {self.out.readlink()}: the link is replaced, its target left as it is")
        exchanged = _rename(new, self.out, exchange=replaces)
        if not exchanged and replaces:
            if os.path.lexists(self._aside):
                raise OutputError(f"{self._aside} is in the way", hint="move it away")
            self._lock.record(aside=True)
            self.out.rename(self._aside)
            self._lost = True
            try:
                new.rename(self.out)
            except BaseException:
                self._aside.rename(self.out)
                self._lost = False
                raise
            self._lost = False
        try:
            _sync(self.out.parent)
        except OSError as exc:
            if self._taken_back(new, exchanged, replaces):
                raise
            self._warn(f"{self.out} is complete, but may not survive a power loss: {exc.strerror or exc}")
        self._committed = True
        if replaces and not exchanged:
            self._remove_or_say(self._aside)

    def _taken_back(self, new: Path, exchanged: bool, replaces: bool) -> bool:
        """Whether OUT is as it was before `_put_in_place`; what is there is whole in either case."""
        try:
            if exchanged and replaces:
                _rename(new, self.out, exchange=True)
            else:
                self.out.rename(new)
        except OSError:
            return False
        if replaces and not exchanged:
            self._lost = True
            self._aside.rename(self.out)
            self._lost = False
        return True

    def _clean(self) -> None:
        while self._open:
            with contextlib.suppress(OSError):
                os.close(self._open.pop())
        self._record.close()
        if self._owned and (self._committed or not self._needs):  # after an exchange the old output is here
            self._remove_or_say(self.path)
        self._owned = False
        if self._lost:
            self._warn(f"the old {self.out} is at {self._aside}; the next run moves it back")
        if self._lock is not None:
            self._lock.release(keep=self._lost)
            self._lock = None
        while self._made and not self._committed:
            with contextlib.suppress(OSError):
                self._made.pop().rmdir()

    def _remove_or_say(self, path: Path) -> None:
        try:
            _remove(path)
        except OSError as exc:
            self._warn(f"{path} could not be removed: {exc.strerror or exc}; remove it yourself")


def _remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all of it. What fails is tried once more, last, and then raised."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    if os.path.lexists(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, durable; folders where the system can."""
    folder = path.is_dir()
    if folder and sys.platform == "win32":
        return
    fd = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(fd)
    except OSError as exc:
        if not folder or exc.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(fd)


def exchange(new: Path, out: Path, old: Path) -> None:
    """Put the folder `new` where `out` is, and what was there at `old`; in one step where the system has one.

    Raises OSError, and leaves `out` as it was.
    """
    for path in sorted(new.rglob("*"), reverse=True):
        if not path.is_symlink():
            _sync(path)
    if _rename(new, out, exchange=True):
        new.rename(old)
    else:
        out.rename(old)
        try:
            new.rename(out)
        except BaseException:
            old.rename(out)
            raise
    _sync(out.parent)


def _rename(new: Path, out: Path, *, exchange: bool) -> bool:
    """Exchange the two, or rename where nothing is at `out`, atomically; False where there is no such exchange."""
    if sys.platform == "linux":
        import ctypes

        call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        flag = 2 if exchange else 1  # RENAME_EXCHANGE, RENAME_NOREPLACE; -100 is AT_FDCWD
        if call is not None:
            if call(-100, os.fsencode(new), -100, os.fsencode(out), flag) == 0:
                return True
            code = ctypes.get_errno()
            if code not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                raise OSError(code, os.strerror(code))
    if not exchange:
        new.rename(out)
    return not exchange
