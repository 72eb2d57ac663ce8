"""The log of the clients, kept off the terminal: they hold signed addresses, and servers' words."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import field

from llava_convert.core.values import dataclass

_LOGGERS = ("huggingface_hub", "modelscope_hub", "modelscope", "fsspec", "s3fs", "botocore", "aiobotocore", "aiohttp")


@dataclass(eq=False)
class Log:
    """What was logged meanwhile: the lines, and the errors among their arguments.

    Several threads read at once, each with a log of its own. An upload's client logs in threads that it starts: its log
    takes what is logged in a thread without one. (Two uploads at once would hear of each other.)
    """

    every_thread: bool = False
    thread: int = field(default_factory=threading.get_ident)
    lines: list[str] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    def take(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {record.getMessage()}\n")
        args = record.args if isinstance(record.args, tuple) else ()
        self.errors.extend(arg for arg in args if isinstance(arg, BaseException))


class _Ear(logging.Handler):
    """Stands for all handlers of the clients' loggers while anybody listens: loggers are the process's."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.logs: list[Log] = []
        self.mutex = threading.Lock()
        self.undo = ExitStack()

    def emit(self, record: logging.LogRecord) -> None:
        logs = list(self.logs)
        own = [log for log in logs if log.thread == record.thread]
        for log in own or [log for log in logs if log.every_thread]:
            log.take(record)

    def redirect(self) -> None:
        for logger in map(logging.getLogger, _LOGGERS):
            self.undo.callback(_restore, logger, logger.handlers, logger.propagate)
            logger.handlers, logger.propagate = [self], False


def _restore(logger: logging.Logger, handlers: list[logging.Handler], propagate: bool) -> None:
    logger.handlers, logger.propagate = handlers, propagate


_ear = _Ear()


@contextmanager
def overheard(log: Log) -> Iterator[Log]:
    """Take the clients' log away from the terminal, into `log`."""
    with _ear.mutex:
        if not _ear.logs:
            _ear.redirect()
        _ear.logs.append(log)
    try:
        yield log
    finally:
        with _ear.mutex:
            _ear.logs.remove(log)
            if not _ear.logs:
                _ear.undo.close()
