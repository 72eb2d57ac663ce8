"""What people call layouts and dtypes; and options that have no effect on a job, which are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llava_convert
from llava_convert.app.options import Options
from llava_convert.core.errors import UsageError
from llava_convert.layouts.info import LAYOUTS, TARGETS, layout_named


@pytest.mark.parametrize(
    ("word", "layout"),
    [
        *((name, name) for name in LAYOUTS),
        ("HF", "hf"),
        (" Official ", "official"),
        ("vLLM", "hf"),
        ("transformers", "hf"),
        ("ollama", "gguf"),
        ("llama.cpp", "gguf"),
        ("llamacpp", "gguf"),
        ("llava", "official"),
    ],
)
def test_layouts_by_every_name(word: str, layout: str) -> None:
    assert layout_named(word).name == layout


def test_a_layout_that_there_is_not() -> None:
    with pytest.raises(UsageError, match="--to pdf") as refused:
        layout_named("pdf")
    assert all(name in str(refused.value.hint) for name in (*TARGETS, "vllm", "ollama"))


@pytest.mark.parametrize(
    ("word", "dtype"),
    [
        ("auto", None),
        ("float16", "float16"),
        ("FP16", "float16"),
        ("half", "float16"),
        ("torch.float16", "float16"),
        ("bf16", "bfloat16"),
        ("torch.bfloat16", "bfloat16"),
        ("fp32", "float32"),
        ("float", "float32"),
    ],
)
def test_dtypes_by_every_name(word: str, dtype: str | None) -> None:
    assert Options(to="hf", dtype=word).dtype == dtype


@pytest.mark.parametrize("word", ["int8", "", "float8", "torch.int4"])
def test_a_dtype_that_there_is_not(word: str) -> None:
    with pytest.raises(UsageError, match="the choices are auto, float16, bfloat16, float32"):
        Options(to="hf", dtype=word)


def refused(source: Path, out: Path, options: dict[str, Any], *said: str) -> None:
    """Refused before anything is written, by the keyword; in a dry run, too."""
    for dry_run in (False, True):
        with pytest.raises(UsageError) as found:
            llava_convert.convert(source, out=out, dry_run=dry_run, **options)
        text = f"{found.value.message} → {found.value.hint}"
        assert all(part in text for part in said), text
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "hf", "outtype": "q4_k_m"}, ("outtype does not apply to hf", "it is for gguf")),
        ({"to": "official", "mmproj_outtype": "f16"}, ("mmproj_outtype does not apply", "it is for gguf")),
        ({"to": "xtuner", "pre": "llama-bpe"}, ("pre does not apply to xtuner", "it is for gguf")),
        (
            {"to": "xtuner", "image_processor": "llava"},
            ("image_processor does not apply", "for official, ", "hf"),
        ),
        ({"to": "gguf", "dtype": "bf16"}, ("dtype does not apply to gguf", "outtype and mmproj_outtype")),
        ({"to": "hf", "dequantize": True}, ("dequantize=True does not apply", "nothing in iter_2.pth is quantised")),
        (
            {"to": "hf", "part": "llm", "llm": "{tiny}/llm", "lora_alpha": {}, "hub": "both"},
            ("hub, private=True", "push=REPO"),
        ),
        ({"to": "hf", "hub": "modelscope"}, ("hub, private=True", "push=REPO")),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_options_that_do_not_apply(tiny: Path, tmp_path: Path, options: dict[str, Any], said: tuple[str, ...]) -> None:
    filled = {k: v.replace("{tiny}", str(tiny)) if isinstance(v, str) else v for k, v in options.items()}
    refused(tiny / "iter_2.pth", tmp_path / "out", filled, *said)


def test_bases_that_nothing_uses(tiny: Path, tmp_path: Path) -> None:
    """Of a part that is no part of the source; but not where --part, or the layout itself, leaves it out."""
    tower = {"visual_encoder": str(tiny / "vit")}
    llava_convert.convert(tiny / "iter_2.pth", to="gguf", part="llm", out=tmp_path / "g", **tower)
    (alone,) = (tmp_path / "g").glob("*.gguf")
    refused(alone, tmp_path / "o", {"to": "hf", **tower}, "has no use for a vision tower")
    for layout in ("xtuner", "hf"):  # the adapter's base, of one that leaves it out and of one that needs it
        llava_convert.convert(tiny / "iter_2.pth", to=layout, out=tmp_path / f"with-{layout}", **tower)


def test_options_of_another_source(tiny: Path, tmp_path: Path) -> None:
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "hf")
    (tmp_path / "config.py").write_text("model = 1")
    for word, options in (("config", {"config": tmp_path / "config.py"}), ("lora_alpha", {"lora_alpha": 8})):
        refused(tmp_path / "hf", tmp_path / "out", {"to": "official", **options}, f"{word} does not apply")


def test_the_program_that_was_asked_for_is_told(tiny: Path, tmp_path: Path) -> None:
    told = llava_convert.convert(tiny / "iter_2.pth", to="vLLM", out=tmp_path / "out", dry_run=True)
    assert told.layouts == ("pth", "hf") and told.notes[0] == "converting to hf, the layout that vLLM loads"
    assert "loads" not in " ".join(
        llava_convert.convert(tiny / "iter_2.pth", to="HF", out=tmp_path / "out", dry_run=True).notes
    )


def test_verdicts_and_plans_are_short_and_true(tiny: Path, tmp_path: Path) -> None:
    report = llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "out")
    assert len(repr(report)) < 1500 and len(repr(report.plan)) < 100
    verdict = llava_convert.verify(tiny / "iter_2.pth", tmp_path / "out", check=True)
    assert verdict and repr(verdict) == "Verdict(same=True, equal=80, different=0, missing=0, extra=0)"
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    verdict = llava_convert.verify(tiny / "iter_2.pth", tmp_path / "out")
    assert not verdict and "different=1" in repr(verdict)
    with pytest.raises(llava_convert.MismatchError, match="1 tensors differ"):
        llava_convert.verify(tiny / "iter_2.pth", tmp_path / "out", check=True)
