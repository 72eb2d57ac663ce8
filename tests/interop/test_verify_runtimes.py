"""`verify --logits --runtime`: OUT as the programs themselves load and compute it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import llava_convert
from llava_convert.app.logits.compare import BOUNDS
from llava_convert.app.logits.runtimes import RUNTIMES
from llava_convert.core.errors import UsageError
from tests.interop.peer_programs import in_peer

ALL = [
    "prompt", "pixels", "vision_tower.embeddings", "vision_tower.layers.0", "vision_tower.layers.1", "features",
    "projector", "language_model.embeddings", "language_model.layers.0", "language_model.layers.1", "logits",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    wanted: dict[str, dict[str, Any]] = {
        "hf": {"dtype": "float32", "image_processor": "llava"},
        "official": {"dtype": "float32"},
        "gguf": {"outtype": "f16"},
    }
    for to, options in wanted.items():
        llava_convert.convert(tiny / "iter_2.pth", to=to, out=folder / to, **options)
    return folder


def test_transformers(tiny: Path, made: Path, tmp_path: Path) -> None:
    """Its class and processor compute the same to the bit; another template is found at the prompt."""
    good = llava_convert.verify(tiny / "iter_2.pth", made / "hf", logits=True, device="cpu", runtime="transformers")
    found = good.logits
    assert found is not None and found.same and (found.runtime, found.not_shown) == ("transformers", "")
    assert {site.name for site in found.sites} >= set(ALL) - {"vision_tower.embeddings", "vision_tower.layers.0"}
    assert all(site.largest == 0 for site in found.sites) and all(one.parts_at is None for one in found.said)
    shutil.copytree(made / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text(
        "USER: {% for part in messages[0].content %}{{ part.text or '<image>' }}{% endfor %} ASSISTANT:"
    )
    (tmp_path / "hf" / "chat_template.json").unlink()
    bad = llava_convert.verify(tiny / "iter_2.pth", tmp_path / "hf", logits=True, device="cpu", runtime="transformers")
    assert bad.logits is not None and bad.logits.parts is not None and bad.logits.parts.name == "prompt"


def test_transformers_crops_by_default(tiny: Path, tmp_path: Path) -> None:
    """CLIP's own processor cuts what training padded: seen at the pixels, by nothing but the program's own run."""
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "hf", dtype="float32")
    verdict = llava_convert.verify(
        tiny / "iter_2.pth", tmp_path / "hf", logits=True, device="cpu", runtime="transformers"
    )
    assert verdict.logits is not None and verdict.logits.parts is not None
    assert (verdict.logits.parts.name, "--image-processor llava" in verdict.logits.sentence()) == ("pixels", True)


def test_llama_cpp(tiny: Path, made: Path) -> None:
    """It shows logits alone. Its text is right, its pictures are not: ggml-org/llama.cpp#25814."""
    pytest.importorskip("xllamacpp")
    verdict = llava_convert.verify(tiny / "iter_2.pth", made / "gguf", logits=True, device="cpu", runtime="llama.cpp")
    found = verdict.logits
    assert found is not None and (found.dtype, found.bound) == ("float16", BOUNDS["float16"])
    assert [site.name for site in found.sites] == ["prompt", "logits of text", "logits of pictures"]
    text, *pictures = found.said
    assert 0 < found.sites[1].relative < found.bound / 8 and 0 < text.kl < 1e-5 and text.top1 == 1.0
    assert found.sites[0].largest == 0 and "which does not show tower" in found.sentence()
    assert found.parts == found.sites[2] and min(one.kl for one in pictures) > 100 * text.kl


def test_what_a_runtime_does_not_read_is_refused(tiny: Path, made: Path) -> None:
    for name, out in (("llama.cpp", "hf"), ("official", "gguf"), ("transformers", "official"), ("mlx", "gguf")):
        with pytest.raises(UsageError, match=f"is {out}, which {name} does not read") as refused:
            llava_convert.verify(tiny / "iter_2.pth", made / out, logits=True, device="cpu", runtime=name)
        assert "convert it with" in str(refused.value.hint)
    with pytest.raises(UsageError, match="does not apply"):
        llava_convert.verify(tiny / "iter_2.pth", made / "hf", runtime="mlx")


def test_what_is_not_installed_is_said(tiny: Path, made: Path) -> None:
    for name, out, package in (("official", "official", "llava-torch"), ("mlx", "hf", "mlx-vlm")):
        with pytest.raises(UsageError, match="cannot be imported") as refused:
            llava_convert.verify(tiny / "iter_2.pth", made / out, logits=True, device="cpu", runtime=name)
        assert "pip install" in str(refused.value.hint) and package in str(refused.value.hint)


def test_every_runtime_is_a_choice() -> None:
    from typer.testing import CliRunner

    from llava_convert.cli import app

    refused = CliRunner().invoke(app, ["verify", "a", "b", "--logits", "--runtime", "none"])
    assert refused.exit_code == 2 and all(name in refused.output for name in RUNTIMES)


@pytest.mark.peers
def test_official(tiny: Path, made: Path, tmp_path: Path) -> None:
    job = {"source": str(tiny / "iter_2.pth"), "out": str(made / "official"), "runtime": "official"}
    found = in_peer("beside-llava", "run_verify.py", job | {"visual_encoder": str(tiny / "vit")}, tmp_path)["logits"]
    assert (found["same"], found["runtime"]) == (True, "official")
    assert [site["name"] for site in found["sites"]] == ALL and all(site["largest"] == 0 for site in found["sites"])
    config = json.loads((made / "official" / "config.json").read_text())
    shutil.copytree(made / "official", tmp_path / "o")
    (tmp_path / "o" / "config.json").write_text(json.dumps(config | {"image_aspect_ratio": "square"}))
    job |= {"out": str(tmp_path / "o"), "visual_encoder": str(tiny / "vit")}
    assert in_peer("beside-llava", "run_verify.py", job, tmp_path)["logits"]["parts_at"] == "pixels"
    del job["visual_encoder"]
    said, hint = in_peer("beside-llava", "run_verify.py", job, tmp_path)["error"]
    assert "vit" in said and "visual_encoder" in hint


@pytest.mark.peers
def test_mlx(tiny: Path, made: Path, tmp_path: Path) -> None:
    """On a CPU, in float32: as near as another order of sums comes."""
    job = {"source": str(tiny / "iter_2.pth"), "out": str(made / "hf"), "runtime": "mlx"}
    found = in_peer("beside-mlx", "run_verify.py", job, tmp_path)["logits"]
    shown = [name for name in ALL if not name.startswith("language_model.layers")]
    assert [site["name"] for site in found["sites"]] == shown and found["same"]
    assert 0 < max(site["relative"] for site in found["sites"]) < BOUNDS["float32"]
    assert all(one["parts_at"] is None and one["kl"] < 1e-9 for one in found["answers"])
