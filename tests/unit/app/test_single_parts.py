"""Every part that can be written alone is opened again by `inspect`, and judged by `verify` without being told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import llava_convert
from llava_convert.core.errors import UnsupportedError, UsageError

WRITTEN = [
    (to, part)
    for to in ("xtuner", "official", "hf", "gguf")
    for part in ("llm", "projector", "visual-encoder")
    if (to, part) != ("gguf", "projector")  # llama.cpp has no such file
]
# As what each is opened, where it is in transformers' own form, whatever was asked for.
OPENED = {("official", "llm"): "hf", ("official", "visual-encoder"): "hf", ("xtuner", "llm"): "hf"}


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("parts")
    for to, part in WRITTEN:
        llava_convert.convert(tiny / "iter_2.pth", to=to, part=part, out=folder / f"{to}-{part}")
    return {(to, part): folder / f"{to}-{part}" for to, part in WRITTEN}


@pytest.mark.parametrize(("to", "part"), WRITTEN)
def test_a_part_is_opened_and_judged(
    made: dict[tuple[str, str], Path], tiny: Path, tmp_path: Path, to: str, part: str
) -> None:
    out = Path(shutil.copytree(made[to, part], tmp_path / "out"))
    found = llava_convert.inspect(out)
    held = {one.name for one in found.parts if one.state != "absent"}
    assert found.layout == OPENED.get((to, part), to)
    assert held == ({"visual-encoder", "projector"} if (to, part) == ("gguf", "visual-encoder") else {part})
    verdict = llava_convert.verify(tiny / "iter_2.pth", out)
    assert verdict and verdict.equal > 0
    weights = max(
        out.rglob("*"), key=lambda path: (path.suffix in (".safetensors", ".gguf", ".bin"), path.stat().st_size)
    )
    data = bytearray(weights.read_bytes())
    # The last byte of a torch file is its directory's: there the middle is weights.
    data[len(data) // 2 if weights.suffix == ".bin" else -1] ^= 1
    weights.write_bytes(data)
    assert not _same(tiny, out)


def _same(tiny: Path, out: Path) -> bool:
    try:
        return bool(llava_convert.verify(tiny / "iter_2.pth", out))
    except llava_convert.InputError:  # a zip's checksum
        return False


@pytest.mark.parametrize("part", ["visual-encoder", "nothing", 5, []])
def test_the_record_does_not_make_a_part_of_a_whole_model(tiny: Path, tmp_path: Path, part: object) -> None:
    """What the files hold decides: weights that are gone are missing, whatever the record says."""
    out = tmp_path / "out"
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=out)
    record = json.loads((out / "conversion.json").read_text())
    record["options"]["part"] = part
    (out / "conversion.json").write_text(json.dumps(record))
    assert llava_convert.verify(tiny / "iter_2.pth", out)
    weights = load_file(out / "model.safetensors")
    tower = {name: tensor for name, tensor in weights.items() if name.startswith("vision_tower.")}
    save_file(tower, out / "model.safetensors", {"format": "pt"})
    verdict = llava_convert.verify(tiny / "iter_2.pth", out)
    assert not verdict and len(verdict.missing) == len(weights) - len(tower)


def test_a_base_model_is_a_source(tiny: Path, tmp_path: Path) -> None:
    """A language model alone goes where one can go, and nowhere as a LLaVA."""
    found = llava_convert.inspect(tiny / "llm")
    assert found.layout == "hf" and found.why == "it is a language model alone"
    report = llava_convert.convert(tiny / "llm", to="gguf", out=tmp_path / "gguf", outtype="bf16")
    assert report.done and llava_convert.verify(tiny / "llm", tmp_path / "gguf")
    with pytest.raises(UnsupportedError, match="already hf"):
        llava_convert.convert(tiny / "llm", to="hf", out=tmp_path / "hf")
    assert llava_convert.inspect(tiny / "vit").why == "it is a vision tower alone"


def test_a_part_that_is_none(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="part='tower': the choices are all, llm, "):
        llava_convert.convert(tiny / "iter_2.pth", to="hf", part="tower", out=tmp_path / "out")
