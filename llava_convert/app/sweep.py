"""Every checkpoint of a run converted, one after the other: what is done is not done again.

A ledger beside the outputs says of each what it was made of. Files that would come out as those of an earlier step,
since nothing that they are made of has changed (a frozen tower, say), are copied from there: by reflink on file systems
that have it, by the store itself where the outputs lie in one.
"""

from __future__ import annotations

import glob
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from llava_convert.app.cluster import Anywhere
from llava_convert.app.convert import prepared, stamps
from llava_convert.app.options import Options
from llava_convert.app.session import job_session
from llava_convert.core.errors import ConvertError, HubError, InputError, Interrupted, OutputError, UsageError
from llava_convert.core.progress import Reporter, stage
from llava_convert.core.values import dataclass
from llava_convert.model.record import RECORD
from llava_convert.storage.fingerprints import Digest, State, state_of
from llava_convert.storage.json_files import json_bytes
from llava_convert.storage.output.staging import Staging, Twin
from llava_convert.storage.remote.files import WEIGHTS
from llava_convert.storage.remote.reach import url_of

if TYPE_CHECKING:
    from llava_convert.app.jobs.convert import SweepJob

LEDGER = ".llava-convert-sweep.json"
NAME = "{name}"
CONVERTED, THERE, WAITING, REFUSED, PLANNED = "converted", "there already", "not complete", "refused", "to convert"


@dataclass(frozen=True)
class SweepItem:
    """One checkpoint of a sweep: its `state`, with the reason in `said`; `copied` are files of an earlier step."""

    source: str
    out: str
    state: str
    said: str = ""
    copied: int = 0
    exit_code: int = 0

    def as_json(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}


def sweep(job: SweepJob, say: Reporter) -> list[SweepItem]:
    """Convert what the pattern finds and what is not done; with `watch` look again until Ctrl-C.

    A checkpoint that cannot be converted does not stop the others. Raises UsageError for a pattern or a target that
    cannot be one, and InputError where nothing is found.
    """
    if job.out is None or str(job.out).count(NAME) != 1 or NAME not in PurePosixPath(str(job.out)).name:
        raise UsageError(f"a sweep needs an -o that ends in {NAME}", hint=f"for instance -o {job.to}/{NAME}")
    if job.push is not None or job.name is not None:
        raise UsageError("--push and --name do not apply to a sweep", hint="`upload` publishes what it leaves")
    ledger = _Ledger(_template(job), say)
    done: dict[str, SweepItem] = {}
    waits = job.watch
    try:
        while True:
            for source in found(str(job.source)):
                before = done.get(source)
                if before is None or before.state == WAITING:
                    done[source] = item = _one(source, job, ledger, say)
                    if item != before:
                        say.note(f"{item.source}: {item.state}{f' ({item.said})' if item.said else ''}")
            if waits is None:
                break
            time.sleep(waits)
    except KeyboardInterrupt as stopped:
        raise Interrupted(f"interrupted; {_counted(done)}") from stopped
    if not done:
        raise InputError(f"{job.source}: no file matches", hint="quote the pattern, as 'work_dirs/run/iter_*.pth'")
    return list(done.values())


def refuse(items: Sequence[SweepItem]) -> None:
    """Raise the first error of a sweep, with how many there are (its exit code); nothing where all were converted."""
    failed = [item for item in items if item.exit_code]
    if not failed:
        return
    kind = InputError if failed[0].exit_code == InputError.exit_code else ConvertError
    error = kind(
        f"{len(failed)} of {len(items)} checkpoints were not converted: {failed[0].source}: {failed[0].said}",
        hint="the same command goes on from here; `llava-convert inspect` says what each is",
    )
    error.exit_code = failed[0].exit_code
    raise error


def found(pattern: str) -> list[str]:
    """What a pattern finds, here or in a store, in the order of the numbers in names. Raises HubError."""
    url = url_of(Path(pattern))
    if url is None:
        every = glob.glob(str(Path(pattern).expanduser()), recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern
    else:
        from llava_convert.storage.remote.urls import matching

        every = matching(url)
    return sorted(every, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _one(source: str, job: SweepJob, ledger: _Ledger, say: Reporter) -> SweepItem:
    name = PurePosixPath(source.rstrip("/")).name
    name = name.removesuffix(PurePosixPath(name).suffix) if name.endswith(WEIGHTS) else name
    out = _template(job).replace(NAME, name)
    given = {one.name: getattr(job, one.name) for one in fields(Options) if one.init}
    anywhere = Anywhere.of(source, Options(**(given | {"out": out})))
    anywhere = replace(anywhere, options=replace(anywhere.options, resume=True))
    try:
        with job_session(anywhere.options) as session:
            stage(say, "opening")
            ready = prepared(anywhere.source, anywhere.options, session)
            stamp, files = stamps(ready)
            if ledger.has(name, stamp, out):
                return SweepItem(source, out, THERE)
            if job.dry_run:
                return SweepItem(source, out, PLANNED)
            twins = {} if job.digest else ledger.twins(files)  # of those nobody knows the digests of tensors
            made = anywhere.write(ready, say, session, twins)
    except (InputError, HubError) as problem:  # half written, or out of reach: it may be otherwise at the next look
        return SweepItem(source, out, WAITING, problem.message, exit_code=problem.exit_code)
    except OutputError:
        raise
    except ConvertError as problem:
        return SweepItem(source, out, REFUSED, problem.message, exit_code=problem.exit_code)
    ledger.add(name, source, stamp, out, files, made.digests)
    return SweepItem(source, out, CONVERTED, f"{len(twins)} files as an earlier step" if twins else "", len(twins))


def _template(job: SweepJob) -> str:
    """Where the outputs go, as a path or a URL, with NAME in it."""
    return url_of(Path(str(job.out))) or str(Path(str(job.out)).expanduser())


class _Ledger:
    """What was made of what, in a file beside the outputs of a sweep. Raises InputError for what is no ledger."""

    def __init__(self, template: str, say: Reporter) -> None:
        self._say = say
        self._url = url_of(Path(template))
        folder, _, _ = (self._url or template).rpartition("/")
        self._place = f"{folder}/{LEDGER}" if folder else LEDGER
        data = self._read()
        try:
            self._done: dict[str, dict[str, Any]] = dict(json.loads(data)["done"]) if data else {}
            self._twins = {name: _twins_of(entry) for name, entry in self._done.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            raise InputError(
                f"{self._place} is not a ledger of a sweep",
                hint="move it away: the sweep looks at each checkpoint then",
            ) from problem

    def has(self, name: str, stamp: str, out: str) -> bool:
        """Whether a checkpoint was made into `out`, and that is still there."""
        entry = self._done.get(name, {})
        return (entry.get("stamp"), entry.get("out")) == (stamp, out) and self._is_there(out)

    def twins(self, files: Mapping[str, str]) -> dict[str, Twin]:
        """For each file that an earlier step has with the same stamp, where; none where anything touched it since.

        The latest step counts. Raises HubError.
        """
        found: dict[str, Twin] = {}
        for twins in reversed(self._twins.values()):
            for name, stamp in files.items():
                if name not in found and stamp in twins and self._holds(twins[stamp]):
                    found[name] = twins[stamp]
        return found

    def add(
        self,
        name: str,
        source: str,
        stamp: str,
        out: str,
        files: Mapping[str, str],
        digests: Mapping[str, Digest],
    ) -> None:
        """Note what was made; `digests` are what is known of its files. Raises OutputError, HubError."""
        made = {}
        for file, of in files.items():
            digest = digests.get(file)
            if digest is None:  # of a file here, which its state alone tells from another
                digest = Digest("", state_of(Path(out, file).stat()))
            made[file] = {"stamp": of, **asdict(digest)}
        self._done[name] = entry = {"source": source, "out": out, "stamp": stamp, "files": made}
        self._twins.pop(name, None)
        self._twins[name] = _twins_of(entry)
        data = json.dumps({"done": self._done}, indent=1).encode()
        if self._url is not None:
            from llava_convert.storage.remote.urls import write

            write(self._place, data)
            return
        path = Path(self._place)
        with Staging(
            path, LEDGER, force=True, resume=False, needed_bytes=len(data), say=self._say.note, kind="file"
        ) as stage:
            stage.write_bytes(path.name, data)
            stage.commit()

    def _holds(self, twin: Twin) -> bool:
        if self._url is not None:
            from llava_convert.storage.remote.urls import copies, version

            return copies(twin.place) and version(twin.place) == twin.digest.state.version
        return twin.digest.holds(Path(twin.place))

    def _read(self) -> bytes | None:
        if self._url is not None:
            from llava_convert.storage.remote.urls import read_small

            return read_small(self._place)
        path = Path(self._place)
        return json_bytes(path) if path.exists() else None

    def _is_there(self, out: str) -> bool:
        if self._url is not None:
            from llava_convert.storage.remote.urls import read_small

            return read_small(f"{out}/{RECORD}") is not None
        return Path(out, RECORD).is_file()


def _twins_of(entry: Mapping[str, Any]) -> dict[str, Twin]:
    """The files of an entry by their stamps. Raises what an entry of another form raises."""
    return {
        str(one["stamp"]): Twin(f"{entry['out']}/{name}", Digest(str(one["sha256"]), State(**one["state"])))
        for name, one in entry["files"].items()
    }


def _counted(done: Mapping[str, SweepItem]) -> str:
    states = [item.state for item in done.values()]
    counts = ((state, states.count(state)) for state in (CONVERTED, THERE, WAITING, REFUSED))
    return ", ".join(f"{count} {state}" for state, count in counts if count) or "nothing was found"
