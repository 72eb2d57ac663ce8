"""GGUF as a source: files that llama.cpp's own library wrote, against the weights that they were written from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import llava_convert
from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.layouts.gguf.files import Files, find, find_all, stem_of
from llava_convert.storage.headers import Headers
from tests.gguf_models import (
    floats,
    llm_keys,
    llm_tensors,
    projector,
    write,
    write_llm,
    write_mmproj,
)

ROWS = 512
TEXTS = ["What is in the picture?", "naïve café, 描述\n\n  two  spaces", "<|eot_id|>x 12345", ""]
POST = "vision_tower.vision_model.post_layernorm"
Named = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bf16/`, `f32/` and `q8_0/`, each a language model and the same mmproj."""
    out = tmp_path_factory.mktemp("gguf")
    for kind in ("bf16", "f32", "q8_0"):
        (out / kind).mkdir()
        write_llm(out / kind / f"tiny-{kind}.gguf", tiny / "llm", kind.upper())
        write_mmproj(out / kind / "tiny-mmproj-f32.gguf", tiny / "vit")
    return out


@pytest.fixture(scope="module")
def hf(made: Path) -> Path:
    """The bf16 files as a transformers folder."""
    llava_convert.convert(made / "bf16", to="hf", out=made / "hf", dtype="float32", verify="full")
    return made / "hf"


def original(tiny: Path) -> Named:
    """The weights that the files were written from, by their names in transformers' classic dialect."""
    found = {f"language_model.{name}": torch.from_numpy(t) for name, t in floats(tiny / "llm").items()}
    found |= {f"vision_tower.{name}": torch.from_numpy(t) for name, t in floats(tiny / "vit").items()}
    made = projector()
    for index, name in (("0", "linear_1"), ("2", "linear_2")):
        for end in ("weight", "bias"):
            found[f"multi_modal_projector.{name}.{end}"] = torch.from_numpy(made[f"{index}.{end}"])
    return found


def tensors(folder: Path) -> Named:
    found: Named = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def same(found: Named, wanted: Named) -> None:
    """Bit for bit; rows of the vocabulary that the conversion added are left out."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        mine = found[name][: len(tensor)] if name.endswith(("embed_tokens.weight", "lm_head.weight")) else found[name]
        assert torch.equal(mine, tensor.to(mine.dtype)), name


# --- weights


@pytest.mark.parametrize("kind", ["bf16", "f32"])
def test_every_weight_comes_back_bit_for_bit(made: Path, tiny: Path, tmp_path: Path, kind: str) -> None:
    """bf16 by default what the language model is in; the tower's float32 is exact when all is kept in float32."""
    llava_convert.convert(made / kind, to="hf", out=tmp_path / "out", dtype="float32", visual_encoder=str(tiny / "vit"))
    same(tensors(tmp_path / "out"), original(tiny))
    llava_convert.convert(made / kind, to="hf", out=tmp_path / "auto")
    wanted = {"bf16": torch.bfloat16, "f32": torch.float32}[kind]
    assert {t.dtype for t in tensors(tmp_path / "auto").values()} == {wanted}


def test_the_last_layer_norm_stands_in(hf: Path, tiny: Path) -> None:
    found = tensors(hf)
    assert torch.equal(found[f"{POST}.weight"], torch.ones(32))
    assert torch.equal(found[f"{POST}.bias"], torch.zeros(32))
    same(found, original(tiny) | {f"{POST}.weight": torch.ones(32), f"{POST}.bias": torch.zeros(32)})
    record = read(hf, "conversion.json")
    assert record["tensors"][f"{POST}.weight"]["ops"] == [{"op": "constant", "shape": [32], "values": [1.0]}]
    assert record["tensors"][f"{POST}.weight"]["origin"] == "synthetic"
    assert "origin" not in record["tensors"]["vision_tower.vision_model.pre_layrnorm.weight"]
    assert "post_layernorm" in " ".join(record["notes"])
    assert "post_layernorm" in (hf / "README.md").read_text()


def test_the_last_layer_norm_of_a_base(made: Path, tiny: Path, tmp_path: Path) -> None:
    """Also where the file was cut short and the base has a block more."""
    shutil.copy(made / "bf16" / "tiny-bf16.gguf", tmp_path)
    write_mmproj(tmp_path / "cut-mmproj.gguf", tiny / "vit", blocks=2, clip__vision__feature_layer=None)
    llava_convert.convert(
        tmp_path / "tiny-bf16.gguf", to="hf", out=tmp_path / "out", dtype="float32", visual_encoder=str(tiny / "vit")
    )
    wanted = {name: t for name, t in original(tiny).items() if ".layers.2." not in name}
    same(tensors(tmp_path / "out"), wanted)


def test_a_language_model_runs_as_the_original(made: Path, tiny: Path, tmp_path: Path) -> None:
    llava_convert.convert(made / "bf16", to="hf", out=tmp_path / "llm", part="llm")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "llm", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tiny / "llm", dtype=torch.float32)
    ids = torch.arange(40).reshape(1, -1) * 11 % ROWS
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantised_weights(tiny: Path, tmp_path: Path, kind: str) -> None:
    """Refused, naming the option; with it each weight is what llama.cpp's library makes of the block."""
    file = write_llm(tmp_path / "tiny.gguf", tiny / "llm", kind)
    with pytest.raises(UnsupportedError) as refused:
        llava_convert.convert(file, to="hf", out=tmp_path / "refused")
    assert "dequantize=True" in str(refused.value.hint) and kind in refused.value.message
    assert not (tmp_path / "refused").exists()
    llava_convert.convert(file, to="hf", out=tmp_path / "half", dequantize=True)
    assert {t.dtype for t in tensors(tmp_path / "half").values()} == {torch.float16}
    llava_convert.convert(file, to="hf", out=tmp_path / "out", dequantize=True, dtype="float32", verify="full")
    found = tensors(tmp_path / "out")
    number = GGMLQuantizationType[kind]
    for name, weight in floats(tiny / "llm").items():
        # A row's blocks do not depend on where the row stands.
        wanted = dequantize(quantize(weight, number), number) if weight.ndim > 1 else weight
        assert torch.equal(found[name], torch.from_numpy(wanted)), name


def test_an_older_writer_swapped_the_names_of_the_mlp(tiny: Path, tmp_path: Path) -> None:
    file = write_mmproj(tmp_path / "legacy.gguf", tiny / "vit", legacy=True)
    llava_convert.convert(file, to="hf", out=tmp_path / "out", part="visual-encoder")
    found = tensors(tmp_path / "out")
    for name, weight in floats(tiny / "vit").items():
        if "post_layernorm" not in name:
            assert torch.equal(found[name], torch.from_numpy(weight)), name


# --- what stands beside the weights


def test_tokenizer_and_configs(hf: Path, tiny: Path) -> None:
    ours, theirs = AutoTokenizer.from_pretrained(hf), AutoTokenizer.from_pretrained(tiny / "llm")
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids
    text, base = read(hf, "config.json")["text_config"], read(tiny / "llm", "config.json")
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    kept += ("rope_theta", "rms_norm_eps", "max_position_embeddings", "model_type", "tie_word_embeddings")
    assert {key: text[key] for key in kept} == {key: base[key] for key in kept}
    tower, known = read(hf, "config.json")["vision_config"], read(tiny / "vit", "config.json")
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    assert {key: tower[key] for key in (*kept, "hidden_act")} == {key: known[key] for key in (*kept, "hidden_act")}
    assert tower["layer_norm_eps"] == pytest.approx(1e-5, rel=1e-6)
    processor = read(hf, "preprocessor_config.json")
    assert processor["image_mean"] == [0.48145466, 0.4578275, 0.40821073]
    assert processor["size"] == {"shortest_edge": 56}
    assert 457 in np.atleast_1d(read(hf, "generation_config.json")["eos_token_id"])


def test_the_chat_template_is_kept(made: Path, hf: Path, tiny: Path, tmp_path: Path) -> None:
    """For pictures it is made to take them; of a language model alone it stays as it is."""
    said = llm_keys(tiny / "llm")["tokenizer.chat_template"]
    assert read(hf, "tokenizer_config.json")["chat_template"].endswith(said)
    shutil.copy(made / "bf16" / "tiny-bf16.gguf", tmp_path)
    llava_convert.convert(tmp_path / "tiny-bf16.gguf", to="hf", out=tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == said


@pytest.mark.parametrize(
    ("blocks", "said", "layer"),
    [(3, [2], -2), (3, [3], -1), (3, [1], -3), (3, None, -1), (2, None, -1)],
    ids=["last-but-one", "last", "third", "not-told", "cut-short"],
)
def test_which_layer_the_projector_reads(
    made: Path, tiny: Path, tmp_path: Path, blocks: int, said: list[int] | None, layer: int
) -> None:
    shutil.copy(made / "bf16" / "tiny-bf16.gguf", tmp_path)
    write_mmproj(tmp_path / "mmproj.gguf", tiny / "vit", blocks=blocks, clip__vision__feature_layer=said)
    report = llava_convert.convert(tmp_path / "tiny-bf16.gguf", to="hf", out=tmp_path / "hf")
    config = read(tmp_path / "hf", "config.json")
    assert (config["vision_feature_layer"], config["vision_config"]["num_hidden_layers"]) == (layer, blocks)
    assert (said is None) == any("which layer the projector reads" in note for note in report.notes)
    llava_convert.convert(tmp_path / "tiny-bf16.gguf", to="official", out=tmp_path / "official")
    assert read(tmp_path / "official", "config.json")["mm_vision_select_layer"] == layer


def test_a_published_tower_is_recognised(tmp_path: Path) -> None:
    """CLIP-L's own depth without a word on the layer: LLaVA's, and the tower's name and text width are known."""
    from llava_convert.layouts.gguf.mmproj import completed, feature_layer

    config = {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14, "num_hidden_layers": 24, "projection_dim": 4096,
    }  # fmt: skip
    assert feature_layer({}, config, Path("x.gguf"))[0] == -2
    assert feature_layer({}, config | {"num_hidden_layers": 23}, Path("x.gguf"))[0] == -1
    assert completed(config)["projection_dim"] == 768
    assert completed(config | {"hidden_size": 1025})["projection_dim"] == 4096


# --- which files


def files_in(tmp_path: Path, tiny: Path, *names: str) -> Path:
    for name in names:
        if "mmproj" in name:
            write_mmproj(tmp_path / name, tiny / "vit")
        else:
            write_llm(tmp_path / name, tiny / "llm")
    return tmp_path


def test_a_file_takes_the_mmproj_beside_it(tmp_path: Path, tiny: Path) -> None:
    files_in(tmp_path, tiny, "ggml-model-q4_k.gguf", "mmproj-model-f16.gguf")
    llm, mmproj = tmp_path / "ggml-model-q4_k.gguf", tmp_path / "mmproj-model-f16.gguf"
    assert find(llm, Headers()) == find(tmp_path, Headers()) == Files(llm, mmproj)
    assert find(mmproj, Headers()) == Files(None, mmproj)


def test_of_several_the_mmproj_of_the_same_name(tmp_path: Path, tiny: Path) -> None:
    files_in(tmp_path, tiny, "a-Q4_K_M.gguf", "b-f16.gguf", "a-mmproj-f16.gguf", "b-mmproj-f16.gguf")
    assert find(tmp_path / "a-Q4_K_M.gguf", Headers()).mmproj == tmp_path / "a-mmproj-f16.gguf"
    assert find(tmp_path / "b-f16.gguf", Headers()).mmproj == tmp_path / "b-mmproj-f16.gguf"
    shutil.copy(tmp_path / "a-mmproj-f16.gguf", tmp_path / "a-mmproj-q8_0.gguf")
    with pytest.raises(UnsupportedError, match=r"a-mmproj-f16\.gguf, a-mmproj-q8_0\.gguf"):
        find(tmp_path / "a-Q4_K_M.gguf", Headers())


def test_a_folder_of_several_types_must_be_told_which(tmp_path: Path, tiny: Path) -> None:
    files_in(tmp_path, tiny, "a-f16.gguf", "a-q8_0.gguf", "a-mmproj-f16.gguf")
    with pytest.raises(UnsupportedError, match=r"a-f16\.gguf, a-q8_0\.gguf"):
        llava_convert.inspect(tmp_path)
    assert find_all(tmp_path, Headers()) == [
        Files(tmp_path / "a-f16.gguf", tmp_path / "a-mmproj-f16.gguf"),
        Files(tmp_path / "a-q8_0.gguf", None),
    ]


def test_a_language_model_alone(made: Path, tiny: Path, tmp_path: Path) -> None:
    shutil.copy(made / "bf16" / "tiny-bf16.gguf", tmp_path / "text.gguf")
    report = llava_convert.convert(tmp_path / "text.gguf", to="hf", out=tmp_path / "out")
    assert any("no mmproj beside it" in note for note in report.notes)
    assert report.parts["visual-encoder"] == report.parts["projector"] == "not in the output"
    assert read(tmp_path / "out", "config.json")["architectures"] == ["LlamaForCausalLM"]


def test_an_mmproj_alone(tiny: Path, tmp_path: Path) -> None:
    """Its parts one by one; with a language model given it is whole."""
    file = write_mmproj(tmp_path / "mmproj.gguf", tiny / "vit")
    with pytest.raises(InputError, match="language model"):
        llava_convert.convert(file, to="hf", out=tmp_path / "out")
    llava_convert.convert(file, to="official", part="projector", out=tmp_path / "projector")
    assert (tmp_path / "projector" / "mm_projector.bin").is_file()
    llava_convert.convert(file, to="hf", llm=str(tiny / "llm"), out=tmp_path / "out", dtype="float32")
    found = tensors(tmp_path / "out")
    same({k: v for k, v in found.items() if POST not in k}, {k: v for k, v in original(tiny).items() if POST not in k})


def test_split_files_are_one(made: Path, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "split"
    folder.mkdir()
    write(folder / "tiny.gguf", "llama", llm_keys(tiny / "llm"), llm_tensors(tiny / "llm"), "F32", split=12)
    parts = sorted(folder.iterdir())
    assert [part.name for part in parts] == ["tiny-00001-of-00002.gguf", "tiny-00002-of-00002.gguf"]
    for start in (folder, *parts):
        out = tmp_path / f"out-{start.name}"
        llava_convert.convert(start, to="hf", out=out)
        found = tensors(out)
        assert all(torch.equal(found[n], torch.from_numpy(w)) for n, w in floats(tiny / "llm").items())
    parts[1].unlink()
    with pytest.raises(InputError, match="00002-of-00002"):
        llava_convert.convert(parts[0], to="hf", out=tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("llava-llama-3-8b-v1_1-int4.gguf", "llava-llama-3-8b-v1_1"),
        ("llava-llama-3-8b-v1_1-mmproj-f16.gguf", "llava-llama-3-8b-v1_1"),
        ("mmproj-model-f16.gguf", "model"),
        ("LLaVA-v1.5-7B.Q4_K_M.gguf", "llava-v1.5-7b"),
        ("llava-v1.5-7b-mmproj-Q8_0.gguf", "llava-v1.5-7b"),
        ("x-iq3_xxs-00001-of-00003.gguf", "x"),
        ("q4-series-bf16.gguf", "series"),
    ],
)
def test_what_of_a_name_is_the_model(name: str, stem: str) -> None:
    assert stem_of(Path(name)) == stem


# --- the config


def test_a_rope_scaling_that_no_file_tells(tiny: Path, tmp_path: Path) -> None:
    """Its factors are those of no known scaling: the config of the original says it, and the weights are the file's."""
    weights = llm_tensors(tiny / "llm") | {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}
    file = write(tmp_path / "tiny.gguf", "llama", llm_keys(tiny / "llm"), weights, "BF16")
    with pytest.raises(InputError) as refused:
        llava_convert.convert(file, to="hf", out=tmp_path / "out")
    assert "by llm" in str(refused.value.hint)
    assert any("rope_freqs.weight" in text for text in llava_convert.inspect(file).warnings)
    (tmp_path / "base").mkdir()
    config = read(tiny / "llm", "config.json") | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    llava_convert.convert(file, to="hf", out=tmp_path / "out", llm=str(tmp_path / "base"))
    assert read(tmp_path / "out", "config.json")["rope_scaling"] == {"type": "linear", "factor": 2.0}
    found = tensors(tmp_path / "out")
    assert all(torch.equal(found[n].float(), torch.from_numpy(w)) for n, w in floats(tiny / "llm").items())


def test_tied_weights_are_one(tiny: Path, tmp_path: Path) -> None:
    weights = {name: weight for name, weight in llm_tensors(tiny / "llm").items() if name != "output.weight"}
    file = write(tmp_path / "tiny.gguf", "llama", llm_keys(tiny / "llm"), weights, "BF16")
    llava_convert.convert(file, to="hf", out=tmp_path / "out")
    assert read(tmp_path / "out", "config.json")["tie_word_embeddings"] is True


# --- inspect


def test_inspect(made: Path) -> None:
    found = llava_convert.inspect(made / "q8_0")
    assert (found.layout, found.why) == ("gguf", "it holds GGUF files (2)")
    llm, tower, mlp = found.parts
    assert (llm.state, llm.tensors, llm.dtypes) == ("full", 21, ("Q8_0", "float32"))
    assert (tower.state, mlp.state, mlp.tensors) == ("full", "full", 4)
    assert found.settings["architecture"] == "llama"
    assert found.settings["tokenizer"] == "gpt2, llama-bpe, 512 tokens"
    assert found.settings["chat template"] == "yes"
    assert found.settings["context length"] == 8192
    assert found.settings["feature layer"] == -2
    for target in ("hf", "official", "xtuner"):
        assert "dequantize=True" in str(found.targets[target])
    assert llava_convert.inspect(made / "bf16").targets["hf"] is None
