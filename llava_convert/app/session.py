"""What one job runs in: a session for what it opens, and the tables that the user added."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llava_convert.app.options import SourceOptions
from llava_convert.core.progress import Reporter
from llava_convert.core.text import listed
from llava_convert.model.tables.added import tables_added
from llava_convert.storage.remote.session import Session


@contextmanager
def job_session(options: SourceOptions | None) -> Iterator[Session]:
    """A session of a job with these options. Raises InputError for a table that is not what it must be."""
    with tables_added(options.tables if options is not None else ()), Session() as session:
        yield session


def tell_unchecked(session: Session, say: Reporter) -> None:
    """Note which files of a hub were read in parts, whose sha256 was not compared."""
    if files := session.unchecked:
        say.note(
            f"read in parts, so not compared with the sha256 in the hub's listing: {listed(files)} "
            "(--cache fetches whole files, and compares)"
        )
