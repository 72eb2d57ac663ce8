"""The table of the clients' errors, and what is kept off the terminal."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import huggingface_hub
import pytest

from llava_convert.core.errors import HubError, InputError
from llava_convert.core.retry import TransientError
from llava_convert.storage.hubs.errors import Asked, asking
from llava_convert.storage.hubs.log import Log, overheard
from llava_convert.storage.hubs.secrets import scrubbed

READING = Asked("hf://org/m", "the Hub", "log in", "main")
WRITING = Asked("hf://org/m", "the Hub", "log in", "main", writing=True)


class _Refused(OSError):
    """As aiohttp's ClientResponseError: the status is an attribute of the error."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


@pytest.mark.parametrize(
    ("asked", "problem", "sentence", "hint"),
    [
        (READING, _Refused(403), "the token may not read it (403)", "log in"),
        (WRITING, _Refused(403), "the token may not write to it (403)", "the right to write"),
        (READING, _Refused(404), "it does not exist (404)", "check the name"),
        (WRITING, _Refused(404), "the repository does not exist", "log in"),
        (READING, _Refused(507), "the Hub answered with an error of its own (507)", "later"),
        (READING, _Refused(418), "the Hub refused (418): status 418", "check the name"),
        (WRITING, OSError("odd"), "the upload failed (odd)", "the same command again"),
        (READING, FileNotFoundError("x"), "it does not exist", "check the name"),
        (READING, PermissionError("no"), "access is denied (no)", "log in"),
        (READING, TypeError("not None"), "the answer of the Hub makes no sense (not None)", "login page"),
    ],
)
def test_errors_that_stay(asked: Asked, problem: Exception, sentence: str, hint: str) -> None:
    with pytest.raises(HubError) as caught, asking(asked):
        raise problem
    assert caught.value.message.startswith(f"hf://org/m: {sentence}") and hint in str(caught.value.hint)
    assert type(problem).__name__ in caught.value.__notes__[0] and caught.value.__cause__ is None


@pytest.mark.parametrize("asked", [READING, WRITING])
@pytest.mark.parametrize("problem", [*map(_Refused, (408, 425, 429, 500, 502, 503, 504)), ConnectionResetError("cut")])
def test_errors_that_may_pass(asked: Asked, problem: Exception) -> None:
    with pytest.raises(TransientError) as caught, asking(asked):
        raise problem
    assert ("not sent twice" in caught.value.hint) == asked.writing


def test_a_file_that_the_client_does_not_find_is_no_fault_of_the_hub(tmp_path: Path) -> None:
    sending = Asked("hf://org/m", "the Hub", "log in", "main", writing=True, sends=tmp_path)
    with pytest.raises(InputError, match=r"gone\.json: cannot be read") as caught, asking(sending):
        huggingface_hub.CommitOperationAdd("gone.json", tmp_path / "gone.json")
    assert caught.value.hint


def test_a_file_that_the_network_hides_is_not_missing() -> None:
    """fsspec says FileNotFoundError of any page of the web that it cannot have; why is in the cause."""
    with pytest.raises(TransientError, match="the connection failed"), asking(READING):
        raise FileNotFoundError("x") from ConnectionRefusedError("refused")


def test_a_bug_of_ours_is_no_error_of_a_hub() -> None:
    with pytest.raises(AssertionError), asking(READING):
        raise AssertionError


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Bearer abc, and hf_abcdefgh", "Bearer ***, and ***"),
        ("Authorization: Basic dXNlcjpwdw==", "Authorization: Basic ***"),
        ("see https://me:pw@host/x?sig=1&b=2 there", "see https://***@host/x?… there"),
        ("url: /api/x?Signature=1 (Caused by", "url: /api/x?… (Caused by"),
        ("https://host/x#key", "https://host/x#…"),
        ("red \x1b[31m\r\nline", "red \\x1b[31m\\r\nline"),
        ("hf://org/m@v1/x.json: is it there? yes", "hf://org/m@v1/x.json: is it there? yes"),
    ],
)
def test_secrets_in_texts(text: str, found: str) -> None:
    assert scrubbed(text) == found


def test_logs_of_threads_are_kept_apart_and_the_handlers_come_back() -> None:
    logger = logging.getLogger("huggingface_hub")
    before, barrier = (logger.handlers, logger.propagate), threading.Barrier(4)
    logs = {n: Log() for n in range(4)}

    def read(n: int) -> None:
        logs[n].thread = threading.get_ident()
        with overheard(logs[n]):
            barrier.wait()  # all listen at once, and stop in any order
            logger.warning("of %s", n)

    threads = [threading.Thread(target=read, args=(n,)) for n in logs]
    with overheard(Log(every_thread=True)) as upload:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sending = threading.Thread(target=logger.warning, args=("of a file",))
        sending.start()
        sending.join()
    assert [log.lines for log in logs.values()] == [[f"huggingface_hub: of {n}\n"] for n in logs]
    assert upload.lines == ["huggingface_hub: of a file\n"] and (logger.handlers, logger.propagate) == before
