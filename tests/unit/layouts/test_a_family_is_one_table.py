"""A family that exists nowhere, added by one table: to every layout and back, LoRA merged, bits compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import llava_convert
from llava_convert.cli import app
from llava_convert.core import resources
from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.layouts.gguf.names import _tables, tables
from llava_convert.model.tables.families import _architectures, architectures
from llava_convert.model.tables.names import TableError, _layout_table, layout_table
from llava_convert.storage.gguf.file import read_gguf
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.streams import read_whole
from tests.conftest import CHECKOUT
from tests.fused_models import (
    MADE_UP,
    Tensors,
    grouped,
    llama,
    made_up,
    same,
    tensors_of,
    text_config,
    write_llm,
    write_official,
)
from tests.gguf_models import interleaved

Convert = Callable[..., Path]


def forget() -> None:
    for read in (_architectures, _layout_table, _tables):
        read.cache_clear()


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The shipped tables with one more, and nothing else changed; returns that table."""
    home = tmp_path / "home"
    shutil.copytree(CHECKOUT / "mappings", home / "mappings")
    (home / "training").symlink_to(CHECKOUT / "training")
    table = home / "mappings" / "architectures" / "made_up.toml"
    table.write_text(MADE_UP, encoding="utf-8")
    monkeypatch.setattr(resources, "_PACKAGE", home / "llava_convert")
    forget()
    yield table
    forget()


@pytest.fixture
def convert(tmp_path: Path, family: Path) -> Convert:
    def go(source: Path, to: str, out: str, **options: Any) -> Path:
        llava_convert.convert(source, to=to, out=tmp_path / out, verify="full", **options)
        return tmp_path / out

    return go


def tied(tiny: Path) -> Tensors:
    found = llama(tiny)
    del found["lm_head.weight"]
    return found


@pytest.mark.parametrize("layout", ["xtuner", "hf", "gguf"])
@pytest.mark.parametrize("ties", [False, True], ids=["untied", "tied"])
def test_to_every_layout_and_back(tmp_path: Path, tiny: Path, convert: Convert, layout: str, ties: bool) -> None:
    more = {"tensors": tied(tiny), "tie_word_embeddings": True} if ties else {}
    source = write_official(tmp_path / "source", "made_up", tiny, **more)
    options = {"xtuner": {"dtype": "bfloat16"}, "gguf": {"mmproj_outtype": "f32"}}.get(layout, {})
    there = convert(source, layout, "there", **options)
    assert llava_convert.verify(source, there).same
    if layout == "hf":
        config = json.loads((there / "config.json").read_text(encoding="utf-8"))
        assert config["text_config"]["architectures"] == ["MadeUpForCausalLM"]
        found = tensors_of(there)
        assert found["language_model.core.words.weight"].shape == (576, 64), "padded by its role"
        assert ("language_model.answer.weight" in found) is not ties
    back = convert(there, "official", "back", dtype="bfloat16")
    wanted, mine = tensors_of(source), tensors_of(back)
    lost = "vision_model.post_layernorm"  # which no GGUF has
    head = {"answer.weight"} if ties else set()
    kept = {name: t for name, t in wanted.items() if layout != "gguf" or lost not in name}
    assert same({name: t for name, t in mine.items() if name in kept}, kept)
    assert mine.keys() - wanted.keys() <= head
    text = json.loads((back / "config.json").read_text(encoding="utf-8"))
    assert (text["model_type"], text["tie_word_embeddings"]) == ("llava_made_up", ties)


def test_a_gguf_holds_the_parts_turned_for_rope(tmp_path: Path, tiny: Path, convert: Convert) -> None:
    source = write_official(tmp_path / "source", "made_up", tiny)
    file = convert(source, "gguf", "out", name="m") / "m-bf16.gguf"
    gguf = read_gguf(file)
    assert gguf.metadata["general.architecture"].value == "made_up"
    plain = llama(tiny)
    with FilePool() as pool:
        for name, module, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2), ("attn_v", "v_proj", 0)):
            bits = read_whole(pool, gguf.tensors[f"blk.1.{name}.weight"])
            wanted = plain[f"model.layers.1.self_attn.{module}.weight"].view(torch.int16).numpy().view(np.uint16)
            assert (bits == (interleaved(wanted, heads) if heads else wanted)).all(), name
        for name, module in (("ffn_gate", "gate_proj"), ("ffn_up", "up_proj")):
            bits = read_whole(pool, gguf.tensors[f"blk.0.{name}.weight"])
            wanted = plain[f"model.layers.0.mlp.{module}.weight"].view(torch.int16).numpy().view(np.uint16)
            assert (bits == wanted).all()
    assert "blk.0.attn_qkv.weight" not in gguf.tensors


def test_types_are_mixed_by_role(tmp_path: Path, tiny: Path, convert: Convert) -> None:
    """As Llama's, since the names in the file are: the head, and where it is tied the embedding, stay wide."""
    for ties, wide in ((False, "output.weight"), (True, "token_embd.weight")):
        more = {"tensors": tied(tiny), "tie_word_embeddings": True} if ties else {}
        source = write_official(tmp_path / f"source{ties}", "made_up", tiny, **more)
        out = convert(source, "gguf", f"out{ties}", outtype="q4_0", name="m")
        found = read_gguf(out / "m-q4_0.gguf").tensors
        assert (found[wide].dtype, found["blk.0.attn_q.weight"].dtype) == ("Q8_0", "Q4_0")
        assert ("output.weight" in found) is not ties


def test_quantised_parts_of_several_types(tmp_path: Path, tiny: Path, convert: Convert) -> None:
    """q4_k_m keeps v wider than q and k: what they are joined in takes one type, or floats."""
    source = write_official(tmp_path / "source", "made_up", tiny)
    for outtype in ("q8_0", "q4_1"):
        there = convert(source, "gguf", outtype, outtype=outtype)
        assert llava_convert.verify(source, there).same
    with pytest.raises(UnsupportedError) as caught:
        convert(tmp_path / "q8_0", "official", "floats")
    assert "dequantize=True" in str(caught.value.hint)
    back = convert(tmp_path / "q8_0", "official", "floats", dequantize=True, dtype="bfloat16")
    mine = tensors_of(back)["core.blocks.0.attention.wqkv.weight"].float()
    wanted = tensors_of(source)["core.blocks.0.attention.wqkv.weight"].float()
    assert (mine - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_a_lora_on_a_grouped_tensor(tmp_path: Path, tiny: Path, convert: Convert) -> None:
    """Merged into the whole, and into its parts by the rows of B that are theirs."""
    base = write_llm(tmp_path / "base", "made_up", tiny)
    generator = torch.Generator().manual_seed(2)
    found: Tensors = {}
    for layer in range(2):
        at = f"base_model.model.core.blocks.{layer}.attention.wqkv"
        found[f"{at}.lora_A.weight"] = torch.randn((4, 64), generator=generator) * 0.1
        found[f"{at}.lora_B.weight"] = torch.randn((128, 4), generator=generator) * 0.1
    folder = tmp_path / "trained" / "llm_adapter"
    folder.mkdir(parents=True)
    save_file(found, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    options: dict[str, Any] = {"llm": str(base), "part": "llm"}
    whole = tensors_of(convert(tmp_path / "trained", "official", "whole", dtype="float16", **options))
    for layer in range(2):
        at = f"base_model.model.core.blocks.{layer}.attention.wqkv"
        delta = 2.0 * found[f"{at}.lora_B.weight"] @ found[f"{at}.lora_A.weight"]
        wanted = load_file(base / "model.safetensors")[f"core.blocks.{layer}.attention.wqkv.weight"].float() + delta
        assert torch.allclose(whole[f"core.blocks.{layer}.attention.wqkv.weight"].float(), wanted, atol=2e-3)
    llama = convert(tmp_path / "trained", "official", "apart", as_family="llama", dtype="float16", **options)
    apart = tensors_of(llama)
    assert same(made_up(apart), whole)
    out = convert(tmp_path / "trained", "gguf", "gguf", outtype="f16", name="m", **options)
    gguf = read_gguf(out / "m-f16.gguf")
    with FilePool() as pool:
        q, k, v = (read_whole(pool, gguf.tensors[f"blk.0.attn_{x}.weight"]) for x in "qkv")
    name = "core.blocks.0.attention.wqkv.weight"
    mine = grouped(*(torch.from_numpy(one.copy()) for one in (_back(q, 4), _back(k, 2), v)))
    assert torch.equal(mine, whole[name])


def _back(rows: np.ndarray, heads: int) -> np.ndarray:
    """Pairs of rows as two halves again."""
    order = interleaved(np.arange(len(rows), dtype=np.float32), heads).astype(int)
    out = np.empty_like(rows)
    out[order] = rows
    return out


def test_as_llama_it_is_the_llama(tmp_path: Path, tiny: Path, convert: Convert) -> None:
    source = write_official(tmp_path / "source", "made_up", tiny)
    plain = write_official(tmp_path / "plain", "llama", tiny)
    as_llama = convert(source, "official", "as_llama", as_family="llama")
    assert same(tensors_of(as_llama), tensors_of(plain))
    back = convert(as_llama, "official", "back", as_family="made_up")
    assert same(tensors_of(back), tensors_of(source))
    record = json.loads((back / "conversion.json").read_text(encoding="utf-8"))
    assert not any("ops" in entry or "source" in entry for entry in record["tensors"].values()), "all are copies"


FUSED_ON_DISK = """
[gguf]
architecture = "fused"
row = [
  { disk = "token_embd.{param}", canonical = "language_model.model.embed_tokens.{param}" },
  { disk = "blk.{layer}.attn_qkv.{param}", join = "kv_heads", parts = [
    { canonical = "@.self_attn.q_proj.{param}", share = "heads", op = "rope", heads = "heads" },
    { canonical = "@.self_attn.k_proj.{param}", share = "kv_heads", op = "rope", heads = "kv_heads" },
    { canonical = "@.self_attn.v_proj.{param}", share = "kv_heads" },
  ] },
  { disk = "blk.{layer}.ffn_up.{param}", join = "rows", parts = [
    { canonical = "@.mlp.gate_proj.{param}" },
    { canonical = "@.mlp.up_proj.{param}" },
  ] },
  { disk = "blk.{layer}.attn_output.{param}", canonical = "@.self_attn.o_proj.{param}" },
  { disk = "blk.{layer}.ffn_down.{param}", canonical = "@.mlp.down_proj.{param}" },
  { disk = "blk.{layer}.attn_norm.{param}", canonical = "@.input_layernorm.{param}" },
  { disk = "blk.{layer}.ffn_norm.{param}", canonical = "@.post_attention_layernorm.{param}" },
  { disk = "output_norm.{param}", canonical = "language_model.model.norm.{param}" },
  { disk = "output.{param}", canonical = "language_model.lm_head.{param}" },
]
""".replace("@", "language_model.model.layers.{layer}")


def test_several_tensors_that_a_file_keeps_as_one(tmp_path: Path, tiny: Path, convert: Convert, family: Path) -> None:
    """The other way round: a family with q, k and v apart, under an architecture that fuses them turned for rope."""
    keys = MADE_UP[MADE_UP.index("key = [") : MADE_UP.index("[as.llama]")].replace("made_up.", "fused.")
    text = (CHECKOUT / "mappings" / "architectures" / "llama.toml").read_text(encoding="utf-8")
    for before, after in (('"llama"', '"apart"'), ("llava_llama", "llava_apart"), ('"llava"', '"llava_apart_2"')):
        text = text.replace(before, after)
    family.with_name("apart.toml").write_text(text + FUSED_ON_DISK + keys, encoding="utf-8")
    forget()
    source = write_official(tmp_path / "source", "llama", tiny)
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"model_type": "llava_apart"}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    plain = llama(tiny)
    for outtype in ("bf16", "q8_0"):
        there = convert(source, "gguf", outtype, outtype=outtype, name="m", mmproj_outtype="f32", digest=True)
        verdict = llava_convert.verify(source, there)
        assert verdict.same and not verdict.missing and not verdict.extra
        assert verdict.equal == len(tensors_of(source)) - 2, "all but the layer norm that no mmproj has"
    q, k, v = (plain[f"model.layers.1.self_attn.{x}_proj.weight"].view(torch.int16).numpy() for x in "qkv")
    turned = (torch.from_numpy(one) for one in (interleaved(q, 4), interleaved(k, 2), v))
    with FilePool() as pool:
        bits = read_whole(pool, read_gguf(tmp_path / "bf16" / "m-bf16.gguf").tensors["blk.1.attn_qkv.weight"])
    assert (bits.view(np.int16) == grouped(*turned).numpy()).all()
    record = json.loads((tmp_path / "bf16" / "conversion.json").read_text(encoding="utf-8"))
    entry = record["tensors"]["m-bf16.gguf/blk.1.attn_qkv.weight"]
    assert entry["joined"] == {"groups": 2, "rows": [32, 16, 16]} and len(entry["source"]) == 3
    assert digest_of(bits) == entry["xxh3_128"]
    back = tensors_of(convert(tmp_path / "bf16", "official", "back"))
    wanted = {name: t for name, t in tensors_of(source).items() if "vision_model.post_layernorm" not in name}
    assert same({name: t for name, t in back.items() if name in wanted}, wanted)
    lines = read_gguf(tmp_path / "bf16" / "m-bf16.gguf").tensors
    assert len(lines) == 2 * 6 + 3


def digest_of(values: np.ndarray) -> str:
    return xxhash.xxh3_128(np.ascontiguousarray(values).tobytes()).hexdigest()


def test_a_part_that_is_missing_is_named(tmp_path: Path, tiny: Path, convert: Convert, family: Path) -> None:
    out = convert(write_official(tmp_path / "source", "made_up", tiny), "gguf", "out", name="m")
    file = out / "m-bf16.gguf"
    file.write_bytes(file.read_bytes().replace(b"blk.1.attn_k.weight", b"blk.1.forgettable_x"))
    drop = '[gguf]\ndrop = [{ disk = "blk.{layer}.forgettable_x", reason = "a test" }]'
    family.write_text(MADE_UP.replace("[gguf]", drop), encoding="utf-8")
    forget()
    with pytest.raises(InputError, match=r"lacks blk\.1\.attn_k\.weight, one of the 3 parts of .*wqkv") as caught:
        convert(out, "official", "back")
    assert caught.value.exit_code == 3


def test_the_dialects_of_transformers_5(tmp_path: Path, tiny: Path, convert: Convert) -> None:
    """`model.language_model.…` and `lm_head`, whatever the family calls its own."""
    source = write_official(tmp_path / "source", "made_up", tiny)
    there = convert(source, "hf", "there")
    renamed = {}
    for name, tensor in load_file(there / "model.safetensors").items():
        name = name.replace("language_model.core.", "model.language_model.")
        name = name.replace("language_model.answer.", "lm_head.")
        renamed[name if name.startswith(("model.", "lm_head.")) else f"model.{name}"] = tensor
    save_file(renamed, there / "model.safetensors", {"format": "pt"})
    back = tensors_of(convert(there, "official", "back"))
    assert same({name: t for name, t in back.items()}, tensors_of(source))


@pytest.mark.parametrize("layout", ["pth", "xtuner", "official", "hf", "parts"])
def test_every_layout_has_its_names(family: Path, layout: str) -> None:
    table, made = layout_table(layout), architectures()["made_up"]
    names = made.tensors(text_config("made_up", CHECKOUT / "fixtures" / "tiny"))
    written = [table.write(name) for name in names]
    disks = [found[0] for found in written if found is not None]
    assert len(set(disks)) == len(names) == 15
    for disk, name in zip(disks, names, strict=True):
        read = table.read(disk)
        assert read is not None and read.canonical == name
    assert disks[0].endswith("core.words.weight") and disks[-1].endswith("answer.weight")


def test_an_official_lora_of_it(family: Path) -> None:
    table = layout_table("official")
    for module in ("core.blocks.1.attention.wqkv", "answer"):
        read = table.read(f"base_model.model.{module}.lora_A.weight")
        assert read is not None
        assert (read.canonical, read.dialect) == (f"language_model.{module}.lora_A.weight", "lora")


def test_two_tables_of_one_architecture(family: Path) -> None:
    family.write_text(MADE_UP.replace('[gguf]\narchitecture = "made_up"', '[gguf]\narchitecture = "llama"'))
    forget()
    with pytest.raises(TableError, match="llama has two tables"):
        tables()


def test_it_is_listed(family: Path) -> None:
    done = CliRunner().invoke(app, ["layouts", "--json"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["families"]["made_up"]["model_types"] == ["made_up"]
    assert found["families"]["made_up"]["as"] == ["llama"]
    assert found["families"]["llama"]["as"] == ["internlm", "internlm2", "made_up", "phi3"]
    assert found["families"]["made_up"]["called"] == {"gguf": "made_up"}
    assert found["families"]["mistral"]["called"] == {"gguf": "llama"}
    assert {"join", "part"} <= set(found["ops"])


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (', join = "kv_heads", parts', ", parts", "at least two parts, and `join`"),
        ('op = "rope"', 'op = "turn"', "unknown op"),
        ('embedding = "core.words.weight"', 'embedding = "core.nothing.weight"', "no tensor is the embedding"),
        ('disk = "blk.{layer}.attn_k.{param}"', 'disk = "blk.{layer}.attn_q.{param}"', "can match the same name"),
        ('disk = "blk.{layer}.attn_k.{param}"', 'disk = "blk.{i}.attn_k.{param}"', "different placeholders"),
    ],
)
def test_a_table_that_contradicts_itself(family: Path, before: str, after: str, said: str) -> None:
    assert before in MADE_UP
    family.write_text(MADE_UP.replace(before, after, 1), encoding="utf-8")
    forget()
    with pytest.raises(TableError, match=said):
        tables()
