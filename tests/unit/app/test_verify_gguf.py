"""verify with a GGUF on either side: files that llama.cpp's own library wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import llava_convert
from llava_convert.core.errors import MismatchError
from tests.gguf_models import llm_keys, llm_tensors, write, write_llm, write_mmproj

POST = "vision_tower.vision_model.post_layernorm"


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`gguf/`: two types and an mmproj; `hf/`: what the bf16 one makes, in float32."""
    out = tmp_path_factory.mktemp("verify")
    (out / "gguf").mkdir()
    for kind in ("bf16", "q8_0"):
        write_llm(out / "gguf" / f"tiny-{kind}.gguf", tiny / "llm", kind.upper())
    write_mmproj(out / "gguf" / "tiny-mmproj-f32.gguf", tiny / "vit")
    llava_convert.convert(out / "gguf" / "tiny-bf16.gguf", to="hf", out=out / "hf", dtype="float32")
    return out


def test_what_a_gguf_became(made: Path, tmp_path: Path) -> None:
    """The layer norm that was made up is told, and not claimed to be equal."""
    found = llava_convert.verify(made / "gguf" / "tiny-bf16.gguf", made / "hf")
    assert found.same and found.layouts == ("gguf", "hf")
    assert found.equal == 21 + 53 + 4
    assert found.synthetic == (f"{POST}.bias", f"{POST}.weight")
    assert found.added_rows == {
        "language_model.model.embed_tokens.weight": 64,
        "language_model.lm_head.weight": 64,
    }
    shutil.copytree(made / "hf", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    weights[f"{POST}.weight"] += 1
    save_file(weights, file, {"format": "pt"})
    assert llava_convert.verify(made / "gguf" / "tiny-bf16.gguf", tmp_path / "hf").same
    weights["language_model.model.layers.1.self_attn.q_proj.weight"][3, 5] += 1
    save_file(weights, file, {"format": "pt"})
    found = llava_convert.verify(made / "gguf" / "tiny-bf16.gguf", tmp_path / "hf")
    assert list(found.different) == ["language_model.model.layers.1.self_attn.q_proj.weight"]
    assert found.different["language_model.model.layers.1.self_attn.q_proj.weight"].elements == 1


def test_what_a_quantised_one_became(made: Path, tmp_path: Path) -> None:
    source = made / "gguf" / "tiny-q8_0.gguf"
    llava_convert.convert(source, to="hf", out=tmp_path / "out", dequantize=True, dtype="float32")
    assert llava_convert.verify(source, tmp_path / "out").same
    found = llava_convert.verify(source, made / "hf")
    assert len(found.different) == 16  # the matrices of the language model


def test_each_file_of_a_folder_with_several_types(made: Path, tiny: Path) -> None:
    found = llava_convert.verify(made / "hf", made / "gguf")
    assert found.same and found.layouts == ("hf", "gguf")
    assert found.equal == 21 + 53 + 4 + 21
    (made / "gguf" / "tiny-q8_0.gguf").rename(made / "kept")
    try:
        weights = llm_tensors(tiny / "llm")
        weights["blk.1.ffn_up.weight"][0, :32] += 1
        write(made / "gguf" / "tiny-q8_0.gguf", "llama", llm_keys(tiny / "llm"), weights, "Q8_0")
        found = llava_convert.verify(made / "hf", made / "gguf")
    finally:
        (made / "kept").replace(made / "gguf" / "tiny-q8_0.gguf")
    name = "tiny-q8_0.gguf: language_model.model.layers.1.mlp.up_proj.weight"
    assert list(found.different) == [name]
    assert 0.5 < found.different[name].largest < 2


def test_a_tensor_in_the_wrong_order_of_rows_is_found(made: Path, tiny: Path, tmp_path: Path) -> None:
    """The commonest slip of converters: q and k as transformers has them."""
    weights = llm_tensors(tiny / "llm")
    weights["blk.0.attn_k.weight"] = (
        load_file(tiny / "llm" / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"].float().numpy()
    )
    write(tmp_path / "tiny.gguf", "llama", llm_keys(tiny / "llm"), weights, "F32")
    found = llava_convert.verify(made / "hf", tmp_path / "tiny.gguf", part="llm")
    assert list(found.different) == ["language_model.model.layers.0.self_attn.k_proj.weight"]


def test_a_missing_mmproj_is_missing(made: Path, tmp_path: Path) -> None:
    shutil.copy(made / "gguf" / "tiny-bf16.gguf", tmp_path)
    found = llava_convert.verify(made / "hf", tmp_path)
    assert not found.same
    assert {name.partition(".")[0] for name in found.missing} == {"vision_tower", "projector"}
    assert llava_convert.verify(made / "hf", tmp_path, part="llm").same


def test_another_feature_layer_is_told(made: Path, tiny: Path, tmp_path: Path) -> None:
    shutil.copy(made / "gguf" / "tiny-bf16.gguf", tmp_path)
    write_mmproj(tmp_path / "mmproj.gguf", tiny / "vit", clip__vision__feature_layer=[3])
    found = llava_convert.verify(made / "hf", tmp_path)
    assert {name: (d.source, d.out) for name, d in found.facts.items()} == {"vision.feature_layer": (2, 3)}
    with pytest.raises(MismatchError, match=r"vision\.feature_layer is 2 in the source, 3 in OUT"):
        found.refuse()


def test_as_json(made: Path) -> None:
    value = json.loads(json.dumps(llava_convert.verify(made / "hf", made / "gguf").as_json()))
    assert (value["same"], value["defects"], value["synthetic"]) == (True, [], [])


def test_a_quantised_output_is_told_apart_from_an_equal_one(tiny: Path, tmp_path: Path) -> None:
    for outtype, quantised in (("q8_0", 16), ("f32", 0)):
        out = tmp_path / outtype
        llava_convert.convert(tiny / "iter_2.pth", to="gguf", outtype=outtype, out=out)
        found = llava_convert.verify(tiny / "iter_2.pth", out)
        assert found and found.quantised == quantised == found.as_json()["quantised"]
