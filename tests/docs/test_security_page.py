"""SECURITY.md names tests that exist, for threats without a gap in their numbers."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"\| (?P<number>\d+) \| [^|]+ \| [^|]+ \| (?P<tests>[^|]+) \|")


def test_each_threat_has_tests_that_exist() -> None:
    rows = [ROW.fullmatch(line) for line in (ROOT / "SECURITY.md").read_text().splitlines() if re.match(r"\| \d", line)]
    assert [int(row["number"]) for row in rows if row] == list(range(1, len(rows) + 1))
    named = [re.findall(r"`(tests/[^`]+\.py)`", row["tests"]) for row in rows if row]
    assert all(named)
    assert [test for tests in named for test in tests if not (ROOT / test).is_file()] == []
