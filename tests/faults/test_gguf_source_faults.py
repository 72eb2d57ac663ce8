"""GGUFs that are sound files and still cannot be used as they are (rows 84 and 85 of the fault list)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llava_convert
from llava_convert.core.errors import InputError, MismatchError, UnsupportedError
from tests.gguf_models import CLIP_KEYS, llm_keys, llm_tensors, vision_tensors, write, write_llm, write_mmproj

Floats = dict[str, Any]


@pytest.fixture(scope="module")
def good(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("good")
    write_llm(out / "tiny.gguf", tiny / "llm", "F32")
    write_mmproj(out / "tiny-mmproj.gguf", tiny / "vit")
    return out


def refused(good: Path, out: Path, *fragments: str) -> None:
    """`verify` ends with exit code 7, and says why."""
    found = llava_convert.verify(good, out)
    assert not found.same
    with pytest.raises(MismatchError) as caught:
        found.refuse()
    assert caught.value.exit_code == 7
    for fragment in fragments:
        assert fragment in caught.value.message


def test_the_good_files_have_no_defect(good: Path) -> None:
    found = llava_convert.verify(good, good)
    assert found.same and found.defects == () and found.equal == 21 + 53 + 4


@pytest.mark.parametrize(
    ("keys", "fragment"),
    [
        ({"tokenizer__ggml__tokens": None}, "holds no tokenizer"),
        ({"tokenizer__ggml__model": None}, "holds no tokenizer"),
        ({"tokenizer__ggml__eos_token_id": None}, "nothing says where an answer ends"),
        ({"tokenizer__ggml__eos_token_id": 449}, "ends turns with <|eot_id|>"),
        ({"tokenizer__ggml__eos_token_id": 512}, "eos_token_id is 512, and there are 512 tokens"),
        ({"tokenizer__ggml__merges": None}, "lacks tokenizer.ggml.merges"),
        ({"tokenizer__ggml__pre": None}, "lacks tokenizer.ggml.pre"),
        ({"tokenizer__ggml__token_type": [1, 1]}, "type (tokenizer.ggml.token_type) for each token"),
    ],
)
def test_row_85_a_language_model_that_cannot_be_talked_with(
    good: Path, tiny: Path, tmp_path: Path, keys: dict[str, Any], fragment: str
) -> None:
    write_llm(tmp_path / "tiny.gguf", tiny / "llm", "F32", **keys)
    write_mmproj(tmp_path / "tiny-mmproj.gguf", tiny / "vit")
    refused(good, tmp_path, fragment)


def test_row_85_an_end_of_turn_key_is_enough(good: Path, tiny: Path, tmp_path: Path) -> None:
    keys = {"tokenizer__ggml__eos_token_id": 449, "tokenizer__ggml__eot_token_id": 457}
    write_llm(tmp_path / "tiny.gguf", tiny / "llm", "F32", **keys)
    write_mmproj(tmp_path / "tiny-mmproj.gguf", tiny / "vit")
    assert llava_convert.verify(good, tmp_path).same


def without(*fragments: str) -> Callable[[Floats], Floats]:
    return lambda found: {name: t for name, t in found.items() if not any(f in name for f in fragments)}


@pytest.mark.parametrize(
    ("edit", "keys", "fragment"),
    [
        (without("mm."), {}, "holds no projector"),
        (without("mm.2."), {}, "lacks 2 tensors: mm.2.bias, mm.2.weight"),
        (without("mm.0.bias"), {}, "mm.0.bias"),
        (without("v.blk.1.attn_k.bias", "v.blk.2.attn_k.bias"), {}, "v.blk.{1…2}.attn_k.bias"),
        (without("v.blk.2."), {}, "v.blk.2.attn_out.bias"),
        (without("position_embd"), {}, "v.position_embd.weight"),
        (without(), {"clip.vision.feature_layer": None}, "lacks clip.vision.feature_layer"),
        (without(), {"clip.vision.projection_dim": None}, "lacks clip.vision.projection_dim"),
        (without(), {"clip.vision.image_mean": None}, "lacks clip.vision.image_mean"),
    ],
)
def test_row_85_an_mmproj_that_crashes_or_misleads_the_runtime(
    good: Path, tiny: Path, tmp_path: Path, edit: Callable[[Floats], Floats], keys: dict[str, Any], fragment: str
) -> None:
    write_llm(tmp_path / "tiny.gguf", tiny / "llm", "F32")
    metadata = {key: value for key, value in (CLIP_KEYS | keys).items() if value is not None}
    write(tmp_path / "tiny-mmproj.gguf", "clip", metadata, edit(vision_tensors(tiny / "vit")), "F32")
    refused(good, tmp_path, fragment)


def quantised(tmp_path: Path, tiny: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    write_llm(folder / "tiny.gguf", tiny / "llm", "Q8_0")
    write_mmproj(folder / "tiny-mmproj.gguf", tiny / "vit", "F16")
    return folder


@pytest.mark.parametrize("to", ["hf", "official", "xtuner"])
def test_row_84_quantised_weights_where_floats_are_needed(tiny: Path, tmp_path: Path, to: str) -> None:
    source = quantised(tmp_path, tiny)
    with pytest.raises(UnsupportedError) as caught:
        llava_convert.convert(source, to=to, out=tmp_path / "out")
    assert caught.value.exit_code == 4
    assert "16 of the" in caught.value.message and "Q8_0" in caught.value.message
    assert "dequantize=True" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
    llava_convert.convert(source, to=to, out=tmp_path / "out", dequantize=True)
    assert (tmp_path / "out" / "model.safetensors").is_file() or list((tmp_path / "out").glob("*.index.json"))


def test_row_84_a_part_that_is_not_quantised_needs_no_option(tiny: Path, tmp_path: Path) -> None:
    llava_convert.convert(quantised(tmp_path, tiny), to="hf", out=tmp_path / "out", part="visual-encoder")
    assert (tmp_path / "out" / "config.json").is_file()


# --- what is unknown, or not all there


def llm_with(tiny: Path, path: Path, edit: Callable[[Floats], Floats], architecture: str = "llama") -> Path:
    return write(path, architecture, llm_keys(tiny / "llm"), edit(llm_tensors(tiny / "llm")), "F32")


def test_an_unknown_tensor(tiny: Path, tmp_path: Path) -> None:
    def edit(found: Floats) -> Floats:
        extra = {f"blk.{i}.attn_gizmo.weight": np.ones((4, 4), np.float32) for i in range(2)}
        return found | extra

    with pytest.raises(UnsupportedError, match=r"2 tensors that nothing takes: blk\.\{0…1\}\.attn_gizmo") as caught:
        llava_convert.inspect(llm_with(tiny, tmp_path / "tiny.gguf", edit))
    assert "nearest" in caught.value.message and "blk.0.attn_" in caught.value.message


def test_a_missing_tensor(tiny: Path, tmp_path: Path) -> None:
    file = llm_with(tiny, tmp_path / "tiny.gguf", without("blk.1.ffn_gate"))
    with pytest.raises(InputError, match=r"lacks 1 tensor of the language model: .*layers\.1\.mlp\.gate_proj"):
        llava_convert.convert(file, to="hf", out=tmp_path / "out")


def test_shapes_and_metadata_disagree(tiny: Path, tmp_path: Path) -> None:
    file = write_llm(tmp_path / "tiny.gguf", tiny / "llm", "F32", llama__feed_forward_length=96)
    with pytest.raises(InputError, match="disagree"):
        llava_convert.convert(file, to="hf", out=tmp_path / "out")


def test_an_unknown_architecture(tiny: Path, tmp_path: Path) -> None:
    file = llm_with(tiny, tmp_path / "tiny.gguf", without(), architecture="mamba")
    with pytest.raises(UnsupportedError, match="mamba"):
        llava_convert.inspect(file)


@pytest.mark.parametrize("kind", ["ldp", "resampler", "gemma3"])
def test_another_projector(tiny: Path, tmp_path: Path, kind: str) -> None:
    file = write_mmproj(tmp_path / "mmproj.gguf", tiny / "vit", clip__projector_type=kind)
    with pytest.raises(UnsupportedError, match=kind):
        llava_convert.inspect(file)


def test_several_feature_layers(tiny: Path, tmp_path: Path) -> None:
    file = write_mmproj(tmp_path / "mmproj.gguf", tiny / "vit", clip__vision__feature_layer=[1, 2])
    with pytest.raises(UnsupportedError, match="only one layer"):
        llava_convert.inspect(file)


def test_a_feature_layer_that_is_not_there(tiny: Path, tmp_path: Path) -> None:
    file = write_mmproj(tmp_path / "mmproj.gguf", tiny / "vit", clip__vision__feature_layer=[4])
    with pytest.raises(InputError, match="the tower has 3 blocks"):
        llava_convert.inspect(file)


def test_a_last_layer_norm_changes_what_the_projector_reads(tiny: Path, tmp_path: Path) -> None:
    def edit(found: Floats) -> Floats:
        return found | {f"v.post_ln.{end}": np.ones(32, np.float32) for end in ("weight", "bias")}

    file = write(tmp_path / "mmproj.gguf", "clip", CLIP_KEYS, edit(vision_tensors(tiny / "vit")), "F32")
    with pytest.raises(UnsupportedError, match=r"v\.post_ln"):
        llava_convert.inspect(file)


def test_no_gguf_after_all(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match="Git LFS pointer"):
        llava_convert.inspect(tmp_path / "tiny.gguf")
