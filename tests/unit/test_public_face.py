"""The public face: what it shows, what its page says, progress, and messages in keywords."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import llava_convert

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"


def test_the_page_tells_of_every_name() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"^(?:### |\| )`(\w+)", text, re.M)) == set(llava_convert.__all__)


def test_every_name_is_there_and_is_documented() -> None:
    assert set(llava_convert.__all__) <= set(dir(llava_convert))
    assert all((getattr(llava_convert, name).__doc__ or "").strip() for name in llava_convert.__all__)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_examples_of_progress_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny)  # the checkpoint names its bases from there
    (tmp_path / "iter_39620.pth").symlink_to(tiny / "iter_2.pth")
    exec(blocks[number], {"llava_convert": llava_convert})
    assert (tmp_path / ("with-a-line", "with-tqdm", "with-rich")[number - 1] / "config.json").is_file()


def test_progress_is_a_function_of_bytes_or_a_reporter(tiny: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    llava_convert.convert(
        tiny / "iter_2.pth", to="hf", out=tmp_path / "o", progress=lambda done, total: seen.append((done, total))
    )
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] > 0 and seen == sorted(seen)


def test_a_plan_writes_nothing_and_takes_what_python_has(tiny: Path, tmp_path: Path) -> None:
    found = llava_convert.plan(
        tiny / "iter_2.pth", to="hf", out=tmp_path / "o", dtype=torch.bfloat16, max_shard_size=5 * 10**9
    )
    assert not found.done and found.dtype == "bfloat16" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"to": "hf", "dtype": "int8"}, "dtype='int8'"),
        ({"to": "hf", "image_processor": "x"}, "image_processor='x'"),
        ({"to": "gguf", "dtype": "float16"}, "dtype does not apply"),
        ({"to": "hf", "outtype": "f16"}, "outtype does not apply"),
        ({"to": "hf", "dequantize": True}, "dequantize=True does not apply"),
        ({"to": "hf", "threads": -1}, "threads=-1"),
        ({"to": "hf", "hub": "modelscope"}, "push=REPO"),
    ],
)
def test_errors_speak_of_keywords(tiny: Path, tmp_path: Path, keywords: dict[str, object], said: str) -> None:
    with pytest.raises(llava_convert.ConvertError) as caught:
        llava_convert.convert(tiny / "iter_2.pth", out=tmp_path / "o", **keywords)
    text = f"{caught.value} {caught.value.hint}"
    assert said in text and not re.search(r"(?<![\w-])--[a-z]", text), text


def test_notes_speak_of_keywords(tiny: Path, tmp_path: Path) -> None:
    found = llava_convert.plan(tiny / "iter_2.pth", to="hf", out=tmp_path / "o")
    assert any("set the id with llm_id" in note for note in found.notes) and not any(
        "--" in note for note in found.notes
    )


def test_short_reprs(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    shown = (
        llava_convert.convert(tiny / "iter_2.pth", to="hf", out=out),
        llava_convert.verify(tiny / "iter_2.pth", out),
        llava_convert.inspect(out),
    )
    assert all(len(repr(one)) < 300 for one in shown), [repr(one) for one in shown]
