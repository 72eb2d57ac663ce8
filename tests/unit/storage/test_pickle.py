"""The pickle machine beside Python's own."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Sequence
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from llava_convert.core.errors import InputError
from llava_convert.storage.pickle import machine

POP, MEMOIZE = b"0", b"\x94"
steps = st.lists(st.tuples(st.sampled_from(["put", "memoize", "get"]), st.integers(0, 12)), max_size=30)


def memo_pickle(taken: Sequence[tuple[str, int]]) -> bytes:
    """A list of what each `get` recalls; each step that remembers does it with a number of its own."""
    data = b"("
    for value, (what, index) in enumerate(taken):
        if what == "get":
            data += b"j" + struct.pack("<I", index)
        else:
            number = b"K" + bytes([value])
            data += number + (MEMOIZE if what == "memoize" else b"r" + struct.pack("<I", index)) + POP
    return data + b"l."


@given(steps)
def test_a_memo_in_any_order_is_pythons(taken: list[tuple[str, int]]) -> None:
    data = memo_pickle(taken)
    try:
        wanted = pickle.loads(data)
    except pickle.UnpicklingError:
        wanted = None
    try:
        found = machine.load(data, path=Path("memo")).root
    except InputError:
        found = None
    assert found == wanted


def test_the_pickles_of_the_property_test_recall_what_was_remembered_ahead() -> None:
    data = memo_pickle([("put", 2), ("put", 0), ("put", 1), ("memoize", 0), ("get", 2), ("get", 3), ("get", 1)])
    assert pickle.loads(data) == [0, 3, 2] == machine.load(data, path=Path("memo")).root
