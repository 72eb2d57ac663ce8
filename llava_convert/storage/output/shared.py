"""A staging folder that several runs fill at a time, each with files of its own; a last run commits it.

Nothing of it needs a lock across machines: a file is written under a name that no other run uses, and takes its own
name when it is whole. The same plan gives the same bytes, so it does not matter who of two comes last. What keeps a
run that commits or discards away is the lock of the folder, where the file system has locks.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from llava_convert.core.errors import InputError, Interrupted, OutputError
from llava_convert.storage.output.finished import OtherPlanError, of_another_plan
from llava_convert.storage.output.locks import Lock
from llava_convert.storage.output.signals import fail_beyond_size_limit
from llava_convert.storage.output.staging import Staging


def share_token() -> str:
    """What no other run has in its names: host, process and chance."""
    host = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:20] or "host"
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"


class SharedStaging(Staging):
    """A share of an output under construction: the files called `names`, in the folder that `Staging` would use.

    What it finishes stays when it ends, however it ends; a later run of the same plan keeps it. Nothing else there is
    touched. It has no `commit`. Raises OutputError where the folder holds files of another plan, and what `Staging`
    raises.
    """

    def __init__(
        self,
        out: Path,
        plan_hash: str,
        names: Collection[str],
        *,
        force: bool,
        needed_bytes: int,
        reads: Iterable[Path] = (),
        say: Callable[[str], None],
        warn: Callable[[str], None] | None = None,
        sha256: bool = False,
    ) -> None:
        super().__init__(
            out,
            plan_hash,
            force=force,
            resume=True,
            needed_bytes=needed_bytes,
            reads=reads,
            say=say,
            warn=warn,
            share=share_token(),
            sha256=sha256,
        )
        self._mine = frozenset(names)

    def commit(self) -> None:
        """Refused: who commits has the folder to itself."""
        raise RuntimeError("a share is no whole output")

    def _recover(self, lock: Lock) -> None:
        if lock.aside:
            hint = "run the command without --files once, which puts the old one back, or move it yourself"
            raise OutputError(f"{self.out} was being replaced when a run was killed", hint=hint)

    def _take_leftover(self) -> None:
        with contextlib.suppress(FileExistsError):
            self.path.mkdir()
        try:
            self._finished = self._record.take_over(self._mine.__contains__)
        except OtherPlanError as other:
            raise of_another_plan(self.path) from other
        if self._finished:
            self._say(f"{len(self._finished)} of its files are there already, {sum(self._finished.values()):,} bytes")

    def _start(self) -> None:
        self._owned = True
        self._record.start()
        try:
            self._record.take_over(lambda name: False)  # two that began at one moment: one of them sees the other here
        except OtherPlanError as other:
            raise of_another_plan(self.path) from other
        self._made.clear()  # others build in them, too
        fail_beyond_size_limit()

    def _clean(self) -> None:
        if self._owned:
            self._owned = False
            with contextlib.suppress(OSError, InputError):  # a file without its line is made again
                self._record.wait()
            for path in self.path.rglob(f"*{self._unfinished}"):
                self._remove_or_say(path)
        super()._clean()

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"interrupted; files that were finished stay in {self.path}")
