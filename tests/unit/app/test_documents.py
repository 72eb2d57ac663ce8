"""README.md and conversion.json, made before the first byte: their errors cost nothing, their sizes are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import llava_convert
from llava_convert.app import convert as engine
from llava_convert.cli import app
from llava_convert.core.errors import InputError
from llava_convert.layouts.info import TARGETS


def on_disk(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("to", [name for name, target in TARGETS.items() if not target.adapters_alone])
@pytest.mark.parametrize(
    "options",
    [{}, {"verify": "full", "digest": True, "max_shard_size": "100KB"}, {"part": "llm", "verify": "full"}],
    ids=["plain", "all that the record can hold", "one part"],
)
def test_every_size_is_known_before(tiny: Path, tmp_path: Path, to: str, options: dict[str, Any]) -> None:
    if to == "pth":  # which the source is already, and which has no shards
        options = {"dtype": "float16", **{name: value for name, value in options.items() if name != "max_shard_size"}}
    planned = llava_convert.convert(tiny / "iter_2.pth", to=to, out=tmp_path / "out", dry_run=True, **options)
    llava_convert.convert(tiny / "iter_2.pth", to=to, out=tmp_path / "out", **options)
    assert planned.files == on_disk(tmp_path / "out")
    assert planned.bytes_written == sum(on_disk(tmp_path / "out").values())


def test_the_size_of_a_projector_alone(tiny: Path, tmp_path: Path) -> None:
    """Which is a torch file."""
    options = {"to": "official", "part": "projector", "digest": True, "out": tmp_path / "out"}
    planned = llava_convert.convert(tiny / "iter_2.pth", dry_run=True, **options)
    llava_convert.convert(tiny / "iter_2.pth", **options)
    assert "mm_projector.bin" in planned.files and planned.files == on_disk(tmp_path / "out")


def test_what_the_run_finds_out_is_filled_in(tiny: Path, tmp_path: Path) -> None:
    llava_convert.convert(tiny / "iter_2.pth", to="official", out=tmp_path / "out", verify="full", digest=True)
    record = json.loads((tmp_path / "out" / "conversion.json").read_text(encoding="utf-8"))
    tensors = [one["xxh3_128"] for one in record["tensors"].values()]
    files = [one["sha256"] for one in record["verified"]["files"].values()]
    assert len(tensors) == 80 and len(files) == len(on_disk(tmp_path / "out")) - 2
    assert not any(set(digest) == {"0"} for digest in (*tensors, *files))


def fails(problem: Exception) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise problem

    return fail


# Parts of the card and of the record, early and late ones.
PARTS_OF_THEM = [
    "llava_convert.app.card.front_matter",
    "llava_convert.app.card.origin",
    "llava_convert.app.card.words.Words.prompt_section",
    "llava_convert.app.card.history",
    "llava_convert.engine.record.identity",
    "llava_convert.engine.record.published",
    "llava_convert.engine.record.dump",
]


@pytest.mark.parametrize("part", PARTS_OF_THEM)
@pytest.mark.parametrize(("problem", "code"), [(InputError("it cannot be read"), 3), (RuntimeError("a bug"), 1)])
def test_an_error_of_theirs_comes_before_the_first_byte(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, problem: Exception, code: int
) -> None:
    """Of the weights; and a dry run finds it, with the same exit code."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("kept")
    failing = property(fails(problem)) if "Words" in part else fails(problem)
    monkeypatch.setattr(part, failing)
    monkeypatch.setattr(engine, "execute", lambda *_, **__: pytest.fail("weights were written"))
    words = ["pth", str(tiny / "iter_2.pth"), "--to", "hf", "-o", str(out), "--force"]
    for more in ([], ["--dry-run"]):
        found = CliRunner().invoke(app, [*words, *more])
        assert found.exit_code == code and str(problem) in found.stderr
        assert {p.name: p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == {"old": "kept"}
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_text_that_does_not_exist_is_found_before_the_first_byte(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = TARGETS["hf"]
    monkeypatch.setitem(TARGETS, "hf", replace(target, whole=replace(target.whole, quickstarts=("nowhere",))))
    for dry_run in (True, False):
        with pytest.raises(InputError, match=r"nowhere\.md"):
            llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "out", dry_run=dry_run)
        assert list(tmp_path.iterdir()) == []
