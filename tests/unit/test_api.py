"""The Python API: the same verbs, the same options, typed results."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import typer

import llava_convert
from llava_convert.cli import app
from llava_convert.core.errors import ConvertError, InputError, OutputError, UnsupportedError, UsageError

REPORT_KEYS = {
    "source", "out", "from", "to", "done", "dtype", "source_dtype", "parts", "tensors", "ops", "bytes_read",
    "bytes_fetched", "bytes_written", "peak_memory", "shards", "files", "verified", "flushed_to_zero", "notes",
    "warnings", "plan", "published", "unchecked",
}  # fmt: skip


def test_names() -> None:
    errors = [name for name in llava_convert.__all__ if name.endswith("Error")]
    assert llava_convert.__all__ == [
        *sorted([*errors, "Inspection", "Published", "ReleaseItem", "Report", "Reporter", "Verdict"]),
        *("convert", "inspect", "plan", "release", "upload", "verify"),
    ]
    assert dir(llava_convert) == sorted([*llava_convert.__all__, "__version__"])
    kinds = ["Convert", "Hub", "Input", "Mismatch", "Output", "Unsafe", "Unsupported", "Usage"]
    assert errors == [f"{kind}Error" for kind in kinds]
    assert all(issubclass(getattr(llava_convert, name), ConvertError) for name in errors)
    with pytest.raises(AttributeError, match="no attribute 'merge'"):
        _ = llava_convert.merge


def options(command: str) -> set[str]:
    group = typer.main.get_command(app)
    found: Any = group.commands[command]  # type: ignore[attr-defined]
    return {p.name for p in found.params} - {"as_json", "quiet", "verbose", "help", "source"}


def test_convert_takes_the_options_of_the_command_line() -> None:
    keywords = set(inspect.signature(llava_convert.convert).parameters) - {"source", "progress"}
    # The command's name says the layout.
    assert keywords - {"source_layout"} == options("convert")


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_the_other_verbs_take_theirs(verb: str) -> None:
    assert options(verb) - set(inspect.signature(getattr(llava_convert, verb)).parameters) == set()


def test_convert_and_verify(tiny: Path, tmp_path: Path) -> None:
    report = llava_convert.convert(str(tiny / "iter_2.pth"), to="official", out=str(tmp_path / "o"))
    assert (report.done, report.layouts, report.out) == (True, ("pth", "official"), tmp_path / "o")
    value = json.loads(json.dumps(report.as_json()))
    assert value.keys() == REPORT_KEYS
    assert (value["tensors"], value["ops"]) == (80, {"cast": 80, "merge_lora": 18})
    assert value["bytes_written"] == sum(p.stat().st_size for p in (tmp_path / "o").iterdir())
    assert value["shards"] == [
        {"name": "model.safetensors", "size": (tmp_path / "o" / "model.safetensors").stat().st_size, "tensors": 80}
    ]
    verdict = llava_convert.verify(tiny / "iter_2.pth", tmp_path / "o")
    assert verdict.same and verdict.equal == 80
    assert verdict.as_json()["different"] == {}


def test_dry_run_writes_nothing(tiny: Path, tmp_path: Path) -> None:
    planned = llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "o", dry_run=True)
    assert not planned.done and list(tmp_path.iterdir()) == []
    real = llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "o")
    assert real.plan.hash == planned.plan.hash
    assert real.as_json() | {"done": False} == planned.as_json()


def test_default_out_is_the_stem_and_the_layout(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert llava_convert.convert(tiny / "iter_2.pth", to="xtuner").out == Path("iter_2_xtuner")
    assert (tmp_path / "iter_2_xtuner" / "projector" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "error", "code"),
    [
        ({"to": "ggml"}, UsageError, 2),
        ({"to": "hf", "part": "x"}, UsageError, 2),
        ({"to": "hf", "max_shard_size": "x"}, UsageError, 2),
        ({"to": "hf", "pretrained_pth": "absent.pth"}, InputError, 3),
        ({"to": "hf", "llm": "/absent", "part": "visual-encoder", "visual_encoder": "/absent"}, InputError, 3),
    ],
)
def test_errors_are_typed(
    tiny: Path, tmp_path: Path, options: dict[str, Any], error: type[ConvertError], code: int
) -> None:
    with pytest.raises(error) as caught:
        llava_convert.convert(tiny / "iter_2.pth", out=tmp_path / "o", **options)
    assert caught.value.exit_code == code and caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_there(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine").write_text("keep")
    with pytest.raises(OutputError) as caught:
        llava_convert.convert(tiny / "iter_2.pth", to="official", out=tmp_path / "o")
    assert caught.value.exit_code == 6 and "force=True" in f"{caught.value.hint}"
    assert (tmp_path / "o" / "mine").read_text() == "keep"
    llava_convert.convert(tiny / "iter_2.pth", to="official", out=tmp_path / "o", force=True)
    assert not (tmp_path / "o" / "mine").exists() and (tmp_path / "o" / "config.json").is_file()


def test_the_same_layout_needs_a_wish(tiny: Path, tmp_path: Path) -> None:
    llava_convert.convert(tiny / "iter_2.pth", to="official", out=tmp_path / "a")
    with pytest.raises(UnsupportedError, match="is already official layout"):
        llava_convert.convert(tmp_path / "a", to="official", out=tmp_path / "b")
    llava_convert.convert(tmp_path / "a", to="official", out=tmp_path / "b", max_shard_size="50KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3


@pytest.mark.parametrize(
    "options",
    [{"dtype": "auto"}, {"dtype": "int8"}, {"verify": "ful"}, {"threads": -1}],
    ids=lambda o: "-".join(map(str, *o.items())),
)
def test_values_of_the_command_line_and_others(tiny: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """`auto` is a value like on the command line; what the command line refuses is a UsageError here."""
    if options.get("dtype") == "auto":
        assert llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "o", **options).dtype == "float16"
        return
    with pytest.raises(UsageError):
        llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "o", **options)
