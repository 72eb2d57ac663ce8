"""`--to gguf` through the command: which files, which types, and what is refused. Bytes are compared with llama.cpp's
own programs in tests/interop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import llava_convert
from llava_convert.core.errors import ConvertError, UnsupportedError, UsageError
from llava_convert.layouts.gguf.write import size_label
from llava_convert.ops import kernels


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "m"
    llava_convert.convert(
        tiny / "iter_2.pth", to="gguf", out=out, outtype="f32,q8_0", mmproj_outtype="f32", name="tiny"
    )
    return out


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def test_the_files(made: Path) -> None:
    assert sorted(p.name for p in made.iterdir()) == [
        "README.md", "conversion.json", "tiny-f32.Modelfile", "tiny-f32.gguf", "tiny-mmproj-f32.gguf",
        "tiny-q8_0.Modelfile", "tiny-q8_0.gguf",
    ]  # fmt: skip
    record = json.loads((made / "conversion.json").read_text())
    assert record["tool"]["kernels"] == kernels.kernels()
    assert {name.split("/")[0] for name in record["tensors"]} == {p.name for p in made.glob("*.gguf")}
    card = (made / "README.md").read_text()
    assert "llama-mtmd-cli -m tiny/tiny-f32.gguf \\\n  --mmproj tiny/tiny-mmproj-f32.gguf" in card
    assert "ollama create tiny -f tiny/tiny-f32.Modelfile" in card and "#25814" in card


def test_types(made: Path) -> None:
    found = types(made / "tiny-q8_0.gguf")
    assert found["output_norm.weight"] == found["blk.0.attn_norm.weight"] == "F32"
    assert {kind for name, kind in found.items() if "norm" not in name} == {"Q8_0"}
    assert set(types(made / "tiny-mmproj-f32.gguf").values()) == {"F32"}


def test_the_language_model(made: Path, tiny: Path) -> None:
    said = fields(made / "tiny-f32.gguf")
    wanted = {
        "general.architecture": "llama", "general.name": "tiny", "general.file_type": 0, "general.size_label": "140K",
        "llama.block_count": 2, "llama.embedding_length": 64, "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16, "llama.rope.freq_base": 500000.0, "llama.vocab_size": 512,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 448,
        "tokenizer.ggml.eos_token_id": 457, "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    assert {key: said[key] for key in wanted} == wanted
    assert len(said["tokenizer.ggml.tokens"]) == 512 and said["tokenizer.ggml.tokens"][457] == "<|eot_id|>"
    assert said["tokenizer.ggml.token_type"][457] == 3 and said["tokenizer.ggml.token_type"][0] == 1
    assert "<|start_header_id|>" in said["tokenizer.chat_template"]


def test_the_mmproj(made: Path) -> None:
    said = fields(made / "tiny-mmproj-f32.gguf")
    wanted = {
        "general.architecture": "clip", "general.type": "mmproj", "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp", "clip.vision.block_count": 3, "clip.vision.feature_layer": [2],
        "clip.vision.image_size": 56, "clip.vision.projection_dim": 64, "clip.use_gelu": False,
    }  # fmt: skip
    assert {key: said[key] for key in wanted} == wanted
    assert np.allclose(said["clip.vision.image_mean"], [0.48145466, 0.4578275, 0.40821073], atol=1e-7)
    names = set(types(made / "tiny-mmproj-f32.gguf"))
    assert len(names) == 57 and not any("post_ln" in name for name in names)
    assert {
        f"v.blk.{i}.attn_{p}.{q}" for i in range(3) for p in ("q", "k", "v", "out") for q in ("weight", "bias")
    } < names


def test_rows_of_q_stand_in_pairs(made: Path, tiny: Path, tmp_path: Path) -> None:
    llava_convert.convert(tiny / "iter_2.pth", to="official", out=tmp_path / "o", dtype="float32")
    from safetensors.numpy import load_file

    stored = load_file(tmp_path / "o" / "model.safetensors")
    tensors = {t.name: t.data for t in gguf.GGUFReader(made / "tiny-f32.gguf").tensors}
    for name, canonical, heads in (("q", "q_proj", 4), ("k", "k_proj", 2)):
        weights = stored[f"model.layers.1.self_attn.{canonical}.weight"]
        rows = [h * 16 + i + 8 * half for h in range(heads) for i in range(8) for half in (0, 1)]
        assert np.array_equal(tensors[f"blk.1.attn_{name}.weight"].reshape(-1, 64), weights[rows])
    assert np.array_equal(
        tensors["blk.1.attn_v.weight"].reshape(-1, 64), stored["model.layers.1.self_attn.v_proj.weight"]
    )


@pytest.mark.parametrize(("part", "files"), [("llm", ["m-f16.gguf"]), ("visual-encoder", ["m-mmproj-f16.gguf"])])
def test_one_part(tiny: Path, tmp_path: Path, part: str, files: list[str]) -> None:
    llava_convert.convert(tiny / "iter_2.pth", to="gguf", out=tmp_path / "m", part=part)
    assert sorted(p.name for p in (tmp_path / "m").glob("*.gguf")) == files


def test_split_files(tiny: Path, tmp_path: Path) -> None:
    llava_convert.convert(tiny / "iter_2.pth", to="gguf", out=tmp_path / "m", max_shard_size="150KB")
    names = sorted(p.name for p in (tmp_path / "m").glob("*.gguf"))
    assert names == ["m-f16-00001-of-00002.gguf", "m-f16-00002-of-00002.gguf", "m-mmproj-f16.gguf"]
    second = fields(tmp_path / "m" / names[1])
    assert (second["split.no"], second["split.count"], second["split.tensors.count"]) == (1, 2, 21)
    assert "FROM ./m-f16-00001-of-00002.gguf" in (tmp_path / "m" / "m-f16.Modelfile").read_text()
    assert llava_convert.verify(tiny / "iter_2.pth", tmp_path / "m").same


def test_the_source_is_read_once(tiny: Path) -> None:
    one = llava_convert.convert(tiny / "iter_2.pth", to="gguf", outtype="f16", dry_run=True)
    two = llava_convert.convert(tiny / "iter_2.pth", to="gguf", outtype="f16,q8_0,int4", dry_run=True)
    assert two.plan.bytes_read == one.plan.bytes_read
    assert [s.name.rpartition("-")[2] for s in two.plan.shards] == ["f16.gguf", "q8_0.gguf", "q4_k_m.gguf", "f16.gguf"]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"outtype": "q9_0"}, UsageError, "the choices are f32, f16"),
        ({"mmproj_outtype": "nope"}, UsageError, "mmproj_outtype='nope'"),
        ({"dtype": "float16"}, UsageError, "outtype"),
        ({"part": "projector"}, UsageError, "visual-encoder"),
        ({"pre": "nope"}, UsageError, "pre='nope'"),
        ({"max_shard_size": "x"}, UsageError, "not a size"),
    ],
)
def test_refused(tiny: Path, tmp_path: Path, options: dict[str, Any], error: type[ConvertError], said: str) -> None:
    with pytest.raises(error) as caught:
        llava_convert.convert(tiny / "iter_2.pth", to="gguf", out=tmp_path / "m", **options)
    assert said in f"{caught.value.message} {caught.value.hint}"
    assert not (tmp_path / "m").exists()


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy makes five types; the K-quants name the extra that brings ggml's kernels."""
    monkeypatch.setattr(kernels, "_ggml", lambda dtype: None)
    kernels.require("Q8_0")
    with pytest.raises(UsageError, match="Q6_K") as caught:
        kernels.require("Q6_K")
    assert "llava-convert[llamacpp]" in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.slow
@pytest.mark.parametrize(("to", "layer"), [("gguf", -1)])
def test_the_feature_layer_of_the_model(tiny: Path, tmp_path: Path, to: str, layer: int) -> None:
    """-1 is after the last block, counted from 0 as the embeddings are."""
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "vision_feature_layer": layer}))
    llava_convert.convert(tmp_path / "hf", to=to, out=tmp_path / "m")
    assert fields(tmp_path / "m" / "m-mmproj-f16.gguf")["clip.vision.feature_layer"] == [3]


def test_the_class_token_cannot_go_along(tiny: Path, tmp_path: Path) -> None:
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "vision_feature_select_strategy": "full"}))
    with pytest.raises(UnsupportedError, match="class token"):
        llava_convert.convert(tmp_path / "hf", to="gguf", out=tmp_path / "m")


def test_a_type_below_q8_0_is_warned_of(tiny: Path) -> None:
    report = llava_convert.convert(tiny / "iter_2.pth", to="gguf", mmproj_outtype="q4_0", dry_run=True)
    assert any("q4_0 sees clearly worse" in text for text in report.warnings)
    assert not llava_convert.convert(tiny / "iter_2.pth", to="gguf", mmproj_outtype="q8_0", dry_run=True).warnings


@pytest.mark.parametrize(
    ("count", "label"), [(148_000, "148K"), (8_030_261_248, "8.0B"), (1_235_814_432, "1.2B"), (6_738_415_616, "6.7B")]
)
def test_size_labels(count: int, label: str) -> None:
    assert size_label(count) == label
