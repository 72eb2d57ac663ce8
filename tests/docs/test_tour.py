"""docs/cli-tour.md is what its commands print, and has thirty of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.docs.tour import PAGE, TOUR, page


def test_there_are_thirty() -> None:
    assert len({stop.question for stop in TOUR}) == len(TOUR) == 30


@pytest.mark.slow
def test_the_page_is_what_is_printed(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody leave its network, which one command does")
    assert PAGE.read_text(encoding="utf-8") == page(tmp_path), "`make docs` writes it"
