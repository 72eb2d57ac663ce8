"""A conversion by the workers of a Dask cluster: shares of its files are the tasks; then the end of it, here.

Scheduling, queues, retries of what a lost worker had, and the wire are `distributed`'s. What makes it safe is the
shared staging: each worker writes whole files and notes them, so that a file that is done is not done again.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from llava_convert.app.convert import convert, prepared, write, write_files
from llava_convert.app.options import Options
from llava_convert.app.planning import Prepared
from llava_convert.app.session import job_session
from llava_convert.core.errors import ConvertError, HubError, Interrupted, UsageError
from llava_convert.core.flags import options_of
from llava_convert.core.progress import Reporter, Silence
from llava_convert.core.values import dataclass
from llava_convert.engine.report import Report
from llava_convert.storage.output.staging import Twin
from llava_convert.storage.remote.reach import url_of
from llava_convert.storage.remote.session import Session

if TYPE_CHECKING:
    from distributed import Client

_SCHEME = "dask"
_LOCAL = "local"
_PATIENCE = 10  # seconds to wait for the scheduler
# Each task plans anew, about a second for 8B. So there are not more of them than keep every worker busy to the end.
_TASKS_EACH, _TASKS = 4, 32
_NEXT = "see the workers' logs; the same command goes on from the files that are there"


@dataclass(frozen=True)
class Anywhere:
    """A conversion as any machine takes it: with paths that do not depend on the folder; and who does it.

    `scheduler` is None where this process does.
    """

    source: str | Path
    options: Options
    scheduler: str | int | None

    @classmethod
    def of(cls, source: str | Path, options: Options) -> Anywhere:
        """Raises UsageError for an executor that is none."""
        scheduler = None if options.executor is None else _scheduler(options.executor)
        return cls(_absolute(source), _everywhere(options), scheduler)

    def write(
        self, ready: Prepared, say: Reporter, session: Session, twins: Mapping[str, Twin] | None = None
    ) -> Report:
        """Write what was planned of it; `twins` as for `write`.

        Raises HubError (exit 8) where the scheduler or the workers are gone, and what `convert` raises, here or there.
        """
        if self.scheduler is None:
            return write(ready, self.options, say, session, twins=twins)
        if twins:
            write(ready, self.options, Silence(), session, names=tuple(twins), twins=twins)
        _write_there(self, ready, self.scheduler, say)
        return write(ready, replace(self.options, finish=True, resume=False), say, session)


def convert_anywhere(source: str | Path, options: Options, say: Reporter) -> Report:
    """Convert here, or by the workers that `options.executor` names. Raises what either does.

    OUT and sources have to be where each of the workers sees them.
    """
    if options.executor is None:
        return convert(source, options, say)
    job = Anywhere.of(source, options)
    with job_session(job.options) as session:
        return job.write(prepared(job.source, job.options, session), say, session)


def _write_there(job: Anywhere, ready: Prepared, scheduler: str | int, say: Reporter) -> None:
    """Have every file with weights written by the workers of a cluster."""
    plan = ready.plan
    options = replace(job.options, out=url_of(ready.out) or ready.out.absolute(), resume=False)
    with _client(scheduler) as client:
        from distributed import as_completed

        workers = len(client.scheduler_info()["workers"])
        count = min(len(plan.shards), max(_TASKS, _TASKS_EACH * workers))
        shares = [plan.share(number, count) for number in range(1, count + 1)]
        say.note(f"{len(plan.shards)} files, {workers} workers")
        done = say.start("converting", sum(shard.size for shard in plan.shards))
        run = secrets.token_hex(8)  # of its own: a scheduler does not do a key again that it has done for somebody
        futures = {
            client.submit(_write, job.source, options, names, key=f"{names[0]}-{run}"): share
            for share in shares
            if (names := [shard.name for shard in share])
        }
        try:
            for future in as_completed(futures, loop=client.loop):  # type: ignore[no-untyped-call]
                _result(future, futures[future][0].name)
                done(sum(shard.size for shard in futures[future]))
        except KeyboardInterrupt as stopped:
            raise Interrupted("interrupted; files that were finished stay: the same command goes on") from stopped
        finally:
            client.cancel(list(futures), force=True)  # type: ignore[no-untyped-call]


def _write(source: str, options: Options, names: list[str]) -> None:
    """The task: some files of the output."""
    write_files(source, options, names)
    gc.collect()  # a plan lies in cycles, and a worker makes one for each task


def _result(future: Any, name: str) -> None:
    from distributed import KilledWorker
    from distributed.client import FutureCancelledError
    from distributed.comm.core import CommClosedError

    try:
        future.result()
    except ConvertError:
        raise
    except (KilledWorker, FutureCancelledError, CommClosedError) as problem:
        raise HubError(f"{name}: no worker of the cluster finished it ({problem})", hint=_NEXT) from problem


def _scheduler(address: str) -> str | int:
    """The scheduler's address, or how many workers to start here. Raises UsageError."""
    parts = urlsplit(address)
    if parts.scheme != _SCHEME or not parts.netloc:
        raise UsageError(f"--executor {address}: give dask://HOST:PORT, or dask://local?workers=N")
    if parts.netloc != _LOCAL:
        return f"tcp://{parts.netloc}"
    given = parse_qs(parts.query, keep_blank_values=True)
    count = given.pop("workers", ["2"])[-1]
    if given or not count.isdigit() or not 1 <= int(count) <= 1024:
        raise UsageError(f"--executor {address}: give dask://local?workers=N, with N 1 or more")
    return int(count)


@contextlib.contextmanager
def _client(scheduler: str | int) -> Iterator[Client]:
    """A connection to a scheduler; to one of this process with so many workers, which end with it."""
    try:
        from distributed import Client, LocalCluster
    except ModuleNotFoundError as missing:
        raise UsageError(
            "--executor needs distributed, which is not installed", hint="pip install 'llava-convert[dask]'"
        ) from missing
    with contextlib.ExitStack() as opened:
        place: Any = scheduler
        if isinstance(scheduler, int):
            cluster: Any = LocalCluster
            quiet = {"dashboard_address": None, "silence_logs": logging.CRITICAL}
            place = opened.enter_context(cluster(n_workers=scheduler, threads_per_worker=1, **quiet))
        try:
            client = opened.enter_context(Client(place, set_as_default=False, timeout=_PATIENCE))  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as problem:
            raise HubError(
                f"{scheduler}: no scheduler answers ({problem})",
                hint="start one by `dask scheduler`, and workers for it by `dask worker`",
            ) from problem
        yield client


def _everywhere(options: Options) -> Options:
    """The options of the conversion alone, with paths of this machine made absolute: workers run in other folders."""
    given: dict[str, Any] = {one.name: getattr(options, one.name) for one in fields(Options) if one.init}
    for name, option in options_of(Options).items():
        if Path in option.types and given[name] is not None:
            several = isinstance(given[name], tuple | list)
            given[name] = tuple(map(_absolute, given[name])) if several else _absolute(given[name])
    return Options(**(given | {"executor": None}))


def _absolute(path: Any) -> str:
    there = Path(str(path)).expanduser()
    return str(there.absolute()) if there.exists() else str(path)
