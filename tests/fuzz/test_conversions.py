"""Some conversions of damaged sources of each kind; `make fuzz` goes on from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from llava_convert.core.errors import InputError, MismatchError, OutputError
from tests.fuzz import conversions
from tests.fuzz.conversions import KINDS, Bench, Outcome

CASES = 6  # of each kind, with nothing of others' readers
JUDGED = 6
# Findings of longer runs, by kind and number, and what they are to end in.
FOUND = {
    ("tokenizer_config.json", 9): 7,  # the chat template ends turns with a token that ends no answer
    ("model.gguf", 185): 3,  # a merge of what is no token: the tokenizers library refuses the tokenizer.json of it
}


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with TemporaryDirectory() as folder:
        yield Bench(Path(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_conversions_end_in_an_output_or_a_refusal(bench: Bench, kind: str) -> None:
    ended = {number: bench.attempt(kind, number, judge=False) for number in range(CASES)}
    assert {number: outcome for number, outcome in ended.items() if outcome.place} == {}
    assert {outcome.code for outcome in ended.values()} <= {0, *conversions.CODES}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_others_take_what_was_made(bench: Bench, kind: str) -> None:
    ended = {number: bench.attempt(kind, number) for number in range(CASES, CASES + JUDGED)}
    assert {number: outcome for number, outcome in ended.items() if outcome.place} == {}


@pytest.mark.parametrize(("kind", "number"), FOUND)
def test_what_was_found(bench: Bench, kind: str, number: int) -> None:
    assert bench.attempt(kind, number) == Outcome(FOUND[kind, number])


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (InputError("no"), ""),
        (MismatchError("no"), ""),
        (OutputError("no"), "exit 6"),
        (InputError(""), "a message that cannot be shown"),
        (InputError("x" * 9000), "a message that cannot be shown"),
        (ValueError("x"), "ValueError"),
        (RecursionError("x"), "RecursionError"),
        (MemoryError("x"), "MemoryError"),
    ],
)
def test_only_refusals_may_escape(bench: Bench, error: Exception, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.source(KINDS["config.json"])

    def convert(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(conversions.llava_convert, "convert", convert)
    assert bench.attempt("config.json", 0).place == place


def test_what_is_left_behind_is_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.source(KINDS["config.json"])

    def convert(*_: object, out: Path, **__: object) -> None:
        out.with_name(".out.partial").mkdir()
        raise InputError("no")

    monkeypatch.setattr(conversions.llava_convert, "convert", convert)
    ended = bench.attempt("config.json", 0)
    assert (ended.code, ended.place) == (3, "left behind") and ".out.partial" in ended.words


def test_time_and_memory_are_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.source(KINDS["config.json"])

    def convert(*_: object, out: Path, **__: object) -> None:
        held = bytearray(400 << 20)
        held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])  # of each page a byte

    monkeypatch.setattr(conversions.llava_convert, "convert", convert)
    assert "MB of memory" in bench.attempt("config.json", 0).words
    monkeypatch.setattr(conversions, "SECONDS", 0.05)

    def spin(*_: object, **__: object) -> None:
        while True:
            pass

    monkeypatch.setattr(conversions.llava_convert, "convert", spin)
    assert "not done after" in bench.attempt("config.json", 0).words


def test_a_case_is_the_same_for_its_number(bench: Bench) -> None:
    for kind in KINDS:
        assert bench.damaged(kind, 3) == bench.damaged(kind, 3)
        assert len({bench.damaged(kind, number) for number in range(20)}) > 15, kind
