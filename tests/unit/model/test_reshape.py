"""`--as`: a Phi-3 written as Llama and back, against a fusion by hand and transformers' own classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import llava_convert
from llava_convert.core.errors import UnsupportedError, UsageError
from llava_convert.storage.gguf.file import read_gguf
from tests.fused_models import Tensors, llama, phi3, same, tensors_of, text_config, write_llm, write_official

LAYOUTS = ("xtuner", "official", "hf")
Convert = Callable[..., Path]


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    def go(source: Path, to: str, out: str, **options: Any) -> Path:
        llava_convert.convert(source, to=to, out=tmp_path / out, verify="full", **options)
        return tmp_path / out

    return go


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_phi_3_as_llama_and_back(tmp_path: Path, tiny: Path, convert: Convert, layout: str) -> None:
    fused, plain = (write_official(tmp_path / kind, kind, tiny) for kind in ("phi3", "llama"))
    options: dict[str, Any] = {} if layout != "official" else {"max_shard_size": "keep"}
    as_llama = convert(fused, layout, "as_llama", as_family="llama", **options)
    wanted = tensors_of(convert(plain, layout, "wanted", **options) if layout != "official" else plain)
    assert same(tensors_of(as_llama), wanted)
    config = json.loads((as_llama / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    assert text["model_type"] == ("llava_llama" if layout == "official" else "llama")
    assert (text["num_key_value_heads"], text["attention_bias"], text["rope_theta"]) == (2, False, 500000.0)
    assert "original_max_position_embeddings" not in text and "sliding_window" not in text
    assert record(as_llama)["options"]["as"] == "llama"
    assert not any("source" in entry for entry in record(as_llama)["tensors"].values())
    assert llava_convert.verify(fused, as_llama).same, "OUT is of another family: the source is compared in its shape"
    back = convert(as_llama, "official", "back", as_family="phi3", dtype="bfloat16")
    tower = "model.vision_tower."
    mine = {name: t for name, t in tensors_of(back).items() if not name.startswith(tower)}
    assert same(mine, {name: t for name, t in tensors_of(fused).items() if not name.startswith(tower)})
    if layout == "official":
        assert not any("ops" in entry for entry in record(back)["tensors"].values()), "all are copies"
    text = json.loads((back / "config.json").read_text(encoding="utf-8"))
    for key, value in text_config("phi3", tiny).items():
        if key not in ("architectures", "model_type", "torch_dtype"):
            assert text.get(key) == value, key
    assert text["model_type"] == "llava_phi3"


def test_as_llama_in_gguf(tmp_path: Path, tiny: Path, convert: Convert) -> None:
    """The file of a Phi-3 as Llama is that of the Llama: names, rows turned for rope, types, bytes."""
    fused, plain = (write_official(tmp_path / kind, kind, tiny) for kind in ("phi3", "llama"))
    for outtype in ("bf16", "q8_0"):
        mine = convert(fused, "gguf", f"mine-{outtype}", as_family="llama", outtype=outtype, name="m")
        theirs = convert(plain, "gguf", f"theirs-{outtype}", outtype=outtype, name="m")
        one, other = ((folder / f"m-{outtype}.gguf") for folder in (mine, theirs))
        assert list(read_gguf(one).tensors) == list(read_gguf(other).tensors)
        keys = [{k: v for k, v in read_gguf(f).metadata.items()} for f in (one, other)]
        assert keys[0] == keys[1]
        assert one.read_bytes() == other.read_bytes()
    back = convert(tmp_path / "mine-bf16", "official", "back", as_family="phi3")
    named = {name: t for name, t in tensors_of(back).items() if name.startswith(("model.layers.", "lm_head"))}
    assert same(named, {name: t for name, t in tensors_of(fused).items() if name in named})


def test_the_same_logits(tmp_path: Path, tiny: Path, convert: Convert) -> None:
    from transformers import AutoModelForCausalLM

    fused = write_llm(tmp_path / "phi3", "phi3", tiny)
    as_llama = convert(fused, "hf", "llama", as_family="llama", dtype="float32")
    back = convert(as_llama, "hf", "back", as_family="phi3")
    ids = torch.tensor([[448, 5, 17, 300, 42, 9, 449, 200]])
    found = {}
    for name, folder in (("phi3", fused), ("llama", as_llama), ("back", back)):
        model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"]
        assert type(model).__name__ == ("LlamaForCausalLM" if name == "llama" else "Phi3ForCausalLM")
        with torch.no_grad():
            found[name] = model(ids).logits
    assert found["phi3"].std() > 1e-3
    assert torch.allclose(found["llama"], found["phi3"], atol=1e-5, rtol=0)
    assert torch.equal(found["back"], found["phi3"])


# --- LoRA


def adapter(folder: Path, modules: dict[str, tuple[int, int]], base: Path, **settings: Any) -> Tensors:
    """An `llm_adapter/` of rank 4 on some modules of each layer, by rows and columns."""
    generator = torch.Generator().manual_seed(11)
    found: Tensors = {}
    for layer in range(2):
        for module, (rows, columns) in modules.items():
            at = f"base_model.model.model.layers.{layer}.{module}"
            found[f"{at}.lora_A.weight"] = torch.randn((4, columns), generator=generator) * 0.1
            found[f"{at}.lora_B.weight"] = torch.randn((rows, 4), generator=generator) * 0.1
    folder.mkdir(parents=True)
    save_file(found, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base), **settings}
    config["target_modules"] = [module.rpartition(".")[2] for module in modules]
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return found


QKV = {"self_attn.qkv_proj": (128, 64), "mlp.gate_up_proj": (256, 64)}
APART = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "mlp.up_proj": (128, 64)}


def test_a_lora_on_a_fused_module_is_split(tmp_path: Path, tiny: Path, convert: Convert) -> None:
    base = write_llm(tmp_path / "base", "phi3", tiny)
    adapter(tmp_path / "trained" / "llm_adapter", QKV, base)
    bases = {"llm": str(base), "part": "llm"}
    merged = tensors_of(convert(tmp_path / "trained", "hf", "merged", **bases))
    as_llama = convert(tmp_path / "trained", "hf", "as_llama", as_family="llama", **bases)
    assert same(phi3(tensors_of(as_llama)), merged)
    assert not same_bits(merged, phi3({k: v.half() for k, v in llama(tiny).items()}))
    ops = record(as_llama)["tensors"]["model.layers.1.self_attn.k_proj.weight"]["ops"]
    assert ops[0]["op"] == "merge_lora" and ops[0]["inputs"][1]["length"] == 32 * 4 * 4, "the rows of B that are k's"


def test_three_loras_become_one_tensor(tmp_path: Path, tiny: Path, convert: Convert) -> None:
    base = write_llm(tmp_path / "base", "llama", tiny)
    adapter(tmp_path / "trained" / "llm_adapter", APART, base)
    bases = {"llm": str(base), "part": "llm"}
    merged = tensors_of(convert(tmp_path / "trained", "hf", "merged", **bases))
    fused = convert(tmp_path / "trained", "hf", "fused", as_family="phi3", digest=True, **bases)
    assert same(tensors_of(fused), phi3(merged))
    entry = record(fused)["tensors"]["model.layers.0.self_attn.qkv_proj.weight"]
    done = [[op["op"] for op in one.get("ops", ())] for one in entry["source"]]
    assert done == [["merge_lora", "cast"], ["merge_lora", "cast"], []], "each before the join; v has no LoRA"
    assert entry["joined"] == {"groups": 1, "rows": [64, 32, 32]}
    assert "file" not in entry and all(one["from"] == "llm" for one in entry["source"])


@pytest.mark.parametrize(("kind", "modules", "other"), [("llama", APART, "phi3"), ("phi3", QKV, "llama")])
def test_an_adapter_that_is_kept_stays_what_it_is(
    tmp_path: Path, tiny: Path, convert: Convert, kind: str, modules: dict[str, tuple[int, int]], other: str
) -> None:
    base = write_llm(tmp_path / "base", kind, tiny)
    adapter(tmp_path / "trained" / "llm_adapter", modules, base)
    with pytest.raises(UnsupportedError, match="keeps the language model's LoRA") as caught:
        convert(tmp_path / "trained", "xtuner", "out", as_family=other, llm=str(base), part="llm")
    assert "official, hf or gguf" in str(caught.value.hint)


def same_bits(one: Tensors, other: Tensors) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# --- what cannot be said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 8, "short_factor": [1.0] * 8}}, "longrope"),
        (
            {"rope_scaling": {"type": "su", "long_factor": [1.0] * 8, "short_factor": [1.0] * 8}},
            "rope_scaling longrope",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"sliding_window": 2047}, "sliding_window 2047"),
        ({"sliding_window": 8191}, "sliding_window 8191"),
    ],
)
def test_what_a_llama_does_not_read_is_refused(
    tmp_path: Path, tiny: Path, convert: Convert, settings: dict[str, Any], said: str
) -> None:
    source = write_llm(tmp_path / "phi3", "phi3", tiny, **settings)
    with pytest.raises(UnsupportedError, match=said):
        convert(source, "hf", "out", as_family="llama")


@pytest.mark.parametrize("settings", [{"sliding_window": 8192}, {"partial_rotary_factor": 1.0}, {"rope_scaling": None}])
def test_what_means_nothing_is_left_out(tmp_path: Path, tiny: Path, convert: Convert, settings: dict[str, Any]) -> None:
    out = convert(write_llm(tmp_path / "phi3", "phi3", tiny, **settings), "hf", "out", as_family="llama")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert not settings.keys() & config.keys()


@pytest.mark.parametrize(
    "settings", [{"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": {"rope_type": "llama3"}}]
)
def test_what_a_phi_3_does_not_read_is_refused(
    tmp_path: Path, tiny: Path, convert: Convert, settings: dict[str, Any]
) -> None:
    source = write_llm(tmp_path / "llama", "llama", tiny, **settings)
    with pytest.raises(UnsupportedError, match="rope_scaling"):
        convert(source, "hf", "out", as_family="phi3")


def test_biases_have_no_place_in_a_phi_3(tmp_path: Path, tiny: Path, convert: Convert) -> None:
    tensors = llama(tiny)
    for layer in range(2):
        for name, rows in (("q", 64), ("k", 32), ("v", 32), ("o", 64)):
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = torch.zeros(rows).bfloat16()
    source = write_llm(tmp_path / "llama", "llama", tiny, tensors, attention_bias=True)
    with pytest.raises(UnsupportedError, match="attention_bias True"):
        convert(source, "hf", "out", as_family="phi3")


def test_where_it_does_not_apply(tmp_path: Path, tiny: Path, convert: Convert) -> None:
    source = write_official(tmp_path / "llama", "llama", tiny)
    for family, kind, said in (
        ("bloom", UsageError, "the choices are gemma2, gemma3, granite, internlm"),
        ("llama", UsageError, "is one already"),
        ("qwen2", UnsupportedError, "no table says how"),
    ):
        with pytest.raises(kind, match=said):
            convert(source, "hf", "out", as_family=family)
    with pytest.raises(UsageError, match="no language model is written"):
        convert(source, "official", "out", as_family="phi3", part="projector")
    with pytest.raises(UnsupportedError, match="no table says how") as caught:
        convert(source, "hf", "out", as_family="mistral")
    assert caught.value.hint == "a llama can be written as internlm, internlm2, phi3"
