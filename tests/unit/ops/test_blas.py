"""BLAS keeps to one thread while ours work, and gets its own back."""

from __future__ import annotations

import numpy as np
import pytest

from llava_convert.ops import blas
from llava_convert.ops.blas import one_thread


@pytest.fixture
def threads() -> object:
    """How OpenBLAS, which NumPy's wheels carry, tells its threads; two at least for the time of a test."""
    name = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]  # type: ignore[call-arg,index]
    if "openblas" not in name:
        pytest.skip(f"NumPy uses {name}")
    tell, set_to = blas._threads()
    before = tell()
    set_to(2)
    yield tell
    set_to(before)


def test_one_thread_until_the_last_user_is_done(threads: object) -> None:
    assert callable(threads) and threads() == 2
    with one_thread():
        assert threads() == 1
        with one_thread():
            assert threads() == 1
        assert threads() == 1
    assert threads() == 2


def test_given_back_after_an_error(threads: object) -> None:
    with pytest.raises(ValueError), one_thread():
        raise ValueError
    assert callable(threads) and threads() == 2
