"""What GGUF says in its own words: names and keys, rope factors, mixes, tokenizers both ways, the Modelfile."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from llava_convert.assets.prompts import chat_template, prompt_templates
from llava_convert.assets.tokenizer.files import Tokenizer, open_tokenizer
from llava_convert.core.errors import InputError, UnsupportedError, UsageError
from llava_convert.core.tensors import StoredTensor
from llava_convert.layouts.gguf import limits, mixes, rope
from llava_convert.layouts.gguf.modelfile import go_template, modelfile
from llava_convert.layouts.gguf.names import config_of, metadata_of, missing, table_for_arch, table_for_family
from llava_convert.layouts.gguf.pre_tokenizers import pre_tokenizer_of, pre_tokenizers
from llava_convert.layouts.gguf.rebuilt import tokenizer_files
from llava_convert.layouts.gguf.vocabulary import tokenizer_metadata
from llava_convert.model.checkpoint import LLM
from llava_convert.model.recipe import Recipe
from llava_convert.model.tables.families import architecture_for
from llava_convert.storage.gguf.file import Typed
from llava_convert.storage.sentencepiece import Piece, read_model, write_model
from llava_convert.storage.sidecars import folder_sidecars, made_sidecars

# --- names and keys

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "rope_scaling": None,
}  # fmt: skip


def config(kind: str, **more: Any) -> dict[str, Any]:
    return architecture_for(LLM, kind).complete({"model_type": kind, **SIZES, **more})


def stored(names: list[str], rows: int = 512) -> dict[str, StoredTensor]:
    return {name: StoredTensor(name, "F32", (rows, 64), ()) for name in names}


@given(
    kind=st.sampled_from(["llama", "qwen2", "phi3"]),
    heads=st.sampled_from([(4, 4), (4, 2), (8, 1)]),
    eps=st.sampled_from([1e-5, 1e-6, 1e-12]),
    theta=st.sampled_from([10000.0, 500000.0, 1000000.0]),
    tied=st.booleans(),
    scaling=st.sampled_from([None, {"type": "linear", "factor": 2.0}]),
)
def test_a_config_comes_back(
    kind: str, heads: tuple[int, int], eps: float, theta: float, tied: bool, scaling: dict[str, Any] | None
) -> None:
    scaling = scaling if kind != "phi3" else None
    before = config(
        kind, num_attention_heads=heads[0], num_key_value_heads=heads[1], rms_norm_eps=eps, rope_theta=theta,
        tie_word_embeddings=tied, rope_scaling=scaling,
    )  # fmt: skip
    table = table_for_family(kind)
    names = ["token_embd.weight"] + ([] if tied else ["output.weight"])
    after = config_of(table, metadata_of(table, before), stored(names))
    for key in (*SIZES, "tie_word_embeddings"):
        if key != "rope_scaling":
            assert after[key] == before[key], key
    assert rope.kind_of(after["rope_scaling"]) == rope.kind_of(scaling)
    assert (after["rope_scaling"] or {}).get("factor") == (scaling or {}).get("factor")


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "phi3", "clip_vision_model"])
def test_every_tensor_has_a_name_and_comes_back(kind: str) -> None:
    part = "vision_tower" if kind.startswith("clip") else LLM
    family = architecture_for(part, kind)
    settings = family.complete({"model_type": kind, **SIZES, "image_size": 56, "patch_size": 14})
    table = table_for_family(kind)
    made = {name: Recipe(StoredTensor(name, "F32", want.shape, ())) for name, want in family.tensors(settings).items()}
    written = table.written(made, settings)
    names = [one.name for one in written]
    for one in written:
        (back,) = table.read(one.name, one.recipe.shape, settings)
        assert back.name == one.old
        assert one.recipe.then(*back.ops) == made[one.old], "the way back undoes it"
    assert len(written) == len([name for name in made if table.omits(name) is None])
    assert len(set(names)) == len(names)
    assert missing(table, settings, names) == []
    gone = [n for n in names if n not in ("blk.1.attn_norm.weight", "v.blk.1.ln1.bias")]
    assert len(missing(table, settings, gone)) == 1


def test_unknown_ones() -> None:
    with pytest.raises(UnsupportedError, match="cannot be written as GGUF"):
        table_for_family("dinov2")
    with pytest.raises(UnsupportedError, match="'bloom'"):
        table_for_arch("bloom")
    with pytest.raises(UnsupportedError, match="'longrope'"):
        metadata_of(table_for_family("llama"), config("llama", rope_scaling={"type": "longrope", "factor": 2.0}))
    with pytest.raises(InputError, match=r"llama\.block_count"):
        config_of(table_for_arch("llama"), {}, {})


def test_a_scaling_that_begins_behind_the_longest_text() -> None:
    """The runtime computes nothing of it: no key says it, and a warning does."""
    dynamic = config("llama", rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=777)
    plain = config("llama", rope_scaling=None, max_position_embeddings=777)
    assert metadata_of(table_for_family("llama"), dynamic) == metadata_of(table_for_family("llama"), plain)
    assert ["777" in line and "dynamic" in line for line in limits.warnings(dynamic)] == [True]
    assert limits.warnings(plain) == []


def test_llama_3_1s_factors() -> None:
    """By hand: fast frequencies keep their pace, slow ones go eight times slower, one between."""
    factors = rope.llama3_factors(500000.0, 128, 8.0, 1.0, 4.0, 8192)
    waves = 2 * np.pi * 500000.0 ** (np.arange(0, 128, 2) / 128)
    assert np.array_equal(factors == 1, waves < 2048) and np.array_equal(factors == 8, waves > 8192)
    between = (factors > 1) & (factors < 8)
    smooth = (8192 / waves[between] - 1) / 3
    assert np.allclose(1 / factors[between], (1 - smooth) / 8 + smooth, rtol=1e-6) and between.sum() > 1


# --- mixes: llama-quantize's own, compared tensor by tensor in tests/interop; here the published rules

HEAVY = {"num_attention_heads": 32, "num_key_value_heads": 8}


@pytest.mark.parametrize(
    ("name", "tensor", "layer", "expected"),
    [
        ("q4_k_m", "output.weight", 0, "Q6_K"), ("q4_k_m", "token_embd.weight", 0, "Q4_K"),
        ("q4_k_m", "blk.0.attn_v.weight", 0, "Q6_K"), ("q4_k_m", "blk.5.attn_v.weight", 5, "Q4_K"),
        ("q4_k_m", "blk.6.ffn_down.weight", 6, "Q6_K"), ("q4_k_m", "blk.31.ffn_down.weight", 31, "Q6_K"),
        ("q4_k_m", "blk.0.attn_qkv.weight", 0, "Q6_K"), ("q2_k", "blk.9.attn_v.weight", 9, "Q4_K"),
        ("q3_k_m", "blk.1.attn_v.weight", 1, "Q5_K"), ("q3_k_l", "blk.9.attn_output.weight", 9, "Q5_K"),
        ("q5_k_s", "blk.0.attn_v.weight", 0, "Q5_K"), ("q6_k", "output.weight", 0, "Q6_K"),
        ("q8_0", "output.weight", 0, "Q8_0"), ("q4_0", "output.weight", 0, "Q6_K"), ("f16", "output.weight", 0, "F16"),
        ("q4_k_m", "output_norm.weight", 0, "F32"),
    ],
)  # fmt: skip
def test_mixes(name: str, tensor: str, layer: int, expected: str) -> None:
    shape = (4096,) if "norm" in tensor else (4096, 4096)
    assert mixes.tensor_type(name, tensor, shape, layer=layer, layers=32, config=HEAVY) == expected


def test_rows_that_are_no_whole_blocks() -> None:
    assert mixes.fitting("Q4_K", (8, 288)) == "Q5_0" and mixes.fitting("Q6_K", (8, 288)) == "Q8_0"
    assert mixes.fitting("Q4_0", (8, 20)) == "F16" and mixes.fitting("Q4_K", (8, 512)) == "Q4_K"
    assert mixes.tensor_type("q4_k_m", "token_embd.weight", (512, 256), tied=True) == "Q6_K"


def test_names_of_types() -> None:
    assert mixes.outtype("INT4") == "q4_k_m"
    with pytest.raises(UsageError, match="q9"):
        mixes.outtype("q9")


# --- tokenizers


def written(folder: Path, pre: Any, *, ignore_merges: bool = False) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "ignore_merges": ignore_merges}
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "pre_tokenizer": pre,
                "model": model,
                "decoder": {"type": "ByteLevel"},
            }
        )
    )
    return open_tokenizer(folder_sidecars(folder))


@pytest.mark.parametrize("name", list(pre_tokenizers()))
def test_each_cut_is_recognised(tmp_path: Path, name: str) -> None:
    row = pre_tokenizers()[name]
    assert pre_tokenizer_of(written(tmp_path, row.component(), ignore_merges=row.ignore_merges)) == name


def test_cuts_written_otherwise(tmp_path: Path) -> None:
    """As the models' own files spell them: SmolLM's digits and GPT-2's pattern are components there."""
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert pre_tokenizer_of(written(tmp_path / "a", plain)) == "gpt-2"
    assert pre_tokenizer_of(written(tmp_path / "b", {"type": "Sequence", "pretokenizers": [digits, plain]})) == "smollm"


def test_an_unknown_cut_names_the_option(tmp_path: Path) -> None:
    tokenizer = written(tmp_path, {"type": "Whitespace"})
    with pytest.raises(UnsupportedError, match="splits text differently") as caught:
        pre_tokenizer_of(tokenizer)
    assert "--pre" in str(caught.value.hint)
    assert pre_tokenizer_of(tokenizer, "qwen2") == "qwen2"


TEXTS = [
    "Hello, world!",
    "  two  spaces\n\n\ttab",
    "我们在2024年看到 3 只猫",
    "naïve café 🙂👩‍👧",
    "1234567 x_y ",
    "",
    "\u00a0\u200b",
]


def test_a_byte_level_tokenizer_there_and_back(tiny: Path) -> None:
    before = open_tokenizer(folder_sidecars(tiny / "llm"))
    said = tokenizer_metadata(before, 512, chat_template="{{ x }}", stop_ids=[449, 457])
    files = tokenizer_files(said)
    assert set(files) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    }
    after = open_tokenizer(made_sidecars(Path("made"), lambda: files))
    assert after.fast["model"] == before.fast["model"]
    assert after.added.keys() == before.added.keys() and (after.bos, after.eos) == (before.bos, before.eos)
    assert (after.adds_bos, after.chat_template) == (True, "{{ x }}")
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [449, 457]
    again = tokenizer_metadata(after, 512, chat_template="{{ x }}", stop_ids=[449, 457])
    assert again == said
    one = tokenizers.Tokenizer.from_str((tiny / "llm" / "tokenizer.json").read_text())
    other = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    for text in [*TEXTS, "a<|eot_id|>b <|start_header_id|>user"]:
        assert other.encode(text).ids == one.encode(text).ids
        assert other.decode(one.encode(text).ids) == one.decode(one.encode(text).ids)


def test_rows_without_a_token(tiny: Path) -> None:
    tokenizer = open_tokenizer(folder_sidecars(tiny / "llm"))
    said = tokenizer_metadata(tokenizer, 576)
    assert said["tokenizer.ggml.tokens"].value[575] == "[PAD575]" and said["tokenizer.ggml.token_type"].value[575] == 5
    with pytest.raises(InputError, match="512 tokens, but the embedding only 500"):
        tokenizer_metadata(tokenizer, 500)


def test_stop_ids_that_the_runtime_does_not_know(tiny: Path) -> None:
    tokenizer = open_tokenizer(folder_sidecars(tiny / "llm"))
    said = tokenizer_metadata(tokenizer, 512, stop_ids=[457, 450, 451])
    assert (said["tokenizer.ggml.eot_token_id"].value, said["tokenizer.ggml.eom_token_id"].value) == (450, 451)
    with pytest.raises(UnsupportedError, match="room for two, an EOT and an EOM"):
        tokenizer_metadata(tokenizer, 512, stop_ids=[457, 450, 451, 452])


PIECES = [Piece("<unk>", 0.0, 2), Piece("<s>", 0.0, 3), Piece("</s>", 0.0, 3)]
PIECES += [Piece(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
PIECES += [Piece(t, -float(n), 1) for n, t in enumerate(["▁a", "▁ab", "bc", "▁abc", "▁", "a", "b", "c"])]


def test_sentencepiece_there_and_back(tmp_path: Path) -> None:
    data = write_model(PIECES, unk=0, bos=1, eos=2, prefix=True)
    assert read_model(data, tmp_path) == (PIECES, True)
    assert read_model(write_model(PIECES, unk=0, bos=1, eos=2, prefix=False), tmp_path)[1] is False
    (tmp_path / "tokenizer.model").write_bytes(data)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    said = tokenizer_metadata(open_tokenizer(folder_sidecars(tmp_path)), len(PIECES) + 5)
    assert said["tokenizer.ggml.model"].value == "llama" and said["tokenizer.ggml.bos_token_id"].value == 1
    assert (
        said["tokenizer.ggml.token_type"].value[:4] == [2, 3, 3, 6] and said["tokenizer.ggml.scores"].value[-1] == -1e4
    )
    files = tokenizer_files(said)
    assert read_model(files["tokenizer.model"], tmp_path) == (PIECES, True)
    fast = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    # The highest score first: a+b before b+c, as SentencePiece does; é as two bytes.
    assert fast.encode("abc").tokens == ["<s>", "▁abc"] and fast.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert fast.decode(fast.encode("abc a é").ids) == "abc a é"


def test_scores_of_merges(tmp_path: Path) -> None:
    """A SentencePiece tokenizer of which only tokenizer.json is left."""
    vocab = {piece.text: i for i, piece in enumerate(PIECES)}
    model = {
        "type": "BPE",
        "byte_fallback": True,
        "unk_token": "<unk>",
        "vocab": vocab,
        "merges": ["▁ a", "▁a b", "b c"],
    }
    content = {"version": "1.0", "added_tokens": [], "normalizer": {"type": "Prepend", "prepend": "▁"}, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    said = tokenizer_metadata(open_tokenizer(folder_sidecars(tmp_path)), len(PIECES))
    scores = dict(zip(said["tokenizer.ggml.tokens"].value, said["tokenizer.ggml.scores"].value, strict=True))
    assert scores["▁a"] > scores["▁ab"] > scores["bc"] > scores["c"] and scores["<0x0A>"] == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer.ggml.token_type": Typed("[i32]", (1, 1))}, "entries for"),
        ({"tokenizer.ggml.tokens": Typed("[str]", ("a",) * 512)}, "twice"),
        ({"tokenizer.ggml.bos_token_id": Typed("u32", 9999)}, "9999"),
        ({"tokenizer.ggml.merges": Typed("u32", 1)}, "merges"),
        ({"tokenizer.ggml.tokens": Typed("[str]", ())}, "0 tokens"),
    ],
)
def test_broken_tokenizers(tiny: Path, change: dict[str, Typed], said: str) -> None:
    metadata = tokenizer_metadata(open_tokenizer(folder_sidecars(tiny / "llm")), 512)
    with pytest.raises(InputError, match=said):
        tokenizer_files({**metadata, **change})


def test_a_pre_tokenizer_of_another_family(tiny: Path) -> None:
    metadata = tokenizer_metadata(open_tokenizer(folder_sidecars(tiny / "llm")), 512)
    with pytest.raises(UnsupportedError, match="'falcon'"):
        tokenizer_files({**metadata, "tokenizer.ggml.pre": Typed("str", "falcon")})


# --- the Modelfile

_ACTION = re.compile(r"\{\{-?\s*(.*?)\s*\}\}", re.DOTALL)


def go(template: str, messages: list[dict[str, str]]) -> str:
    """What our templates use of Go's text/template: range, if eq, if gt, else if, strings, .Content."""
    pieces = re.split(r"(\{\{.*?\}\})", template)
    assert not any(p for p in pieces if p and not p.startswith("{{")), "text outside of actions"
    actions = [_ACTION.fullmatch(p)[1] for p in pieces if p]  # type: ignore[index]
    start, end = actions.index("range $i, $_ := .Messages"), len(actions) - 1 - actions[::-1].index("end")
    body, tail = actions[start + 1 : end], actions[end + 1 :]
    out = ""
    for i, message in enumerate(messages):
        live: list[bool] = []
        taken = False
        for action in body:
            if action.startswith(("if ", "else if ")):
                condition = action.removeprefix("else ").removeprefix("if ")
                name, *operands = condition.split(" ", 2)
                value = message["role"] == json.loads(operands[1]) if name == "eq" else i > int(operands[1])
                if action.startswith("else"):
                    live[-1] = value and not taken
                else:
                    live.append(value)
                taken = taken or live[-1] if len(live) == 1 else taken
            elif action == "end":
                live.pop()
            elif all(live):
                out += message["content"] if action == ".Content" else json.loads(action)
    return out + "".join(json.loads(action) for action in tail)


@pytest.mark.parametrize("name", list(prompt_templates()))
def test_ollamas_prompt_is_the_trained_one(tiny: Path, name: str) -> None:
    """Beside the Jinja template, itself compared with what xtuner encodes."""
    tokenizer = open_tokenizer(folder_sidecars(tiny / "llm"))
    text = go_template(name, tokenizer)
    if "{round}" in prompt_templates()[name].user:
        assert text is None
        return
    assert text is not None
    messages = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me."},
        {"role": "user", "content": "Why?"},
    ]
    if prompt_templates()[name].system is not None:
        messages.insert(0, {"role": "system", "content": "Be brief."})
    jinja = chat_template(name, bos_token=tokenizer.bos, first_bos=False)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    wanted = environment.from_string(jinja).render(
        messages=messages, eos_token=tokenizer.eos, add_generation_prompt=True
    )
    found = go(text, messages)
    if messages[0]["role"] == "system":
        # The Go side counts messages: a system message goes first, so its user's turn begins without a BOS in training.
        wanted = wanted.replace(f"Be brief.{tokenizer.bos}", "Be brief.")
    assert found.replace(str(tokenizer.bos), "") == wanted.replace(str(tokenizer.bos), "")


def test_the_modelfile(tiny: Path) -> None:
    tokenizer = open_tokenizer(folder_sidecars(tiny / "llm"))
    text = modelfile(
        ["m-f16.gguf"],
        "m-mmproj.gguf",
        template="vicuna",
        tokenizer=tokenizer,
        stops=["</s>", "</s>", 'a"b'],
        context=131072,
        has_own=True,
    ).decode()
    lines = text.splitlines()
    assert lines[:2] == ["FROM ./m-f16.gguf", "FROM ./m-mmproj.gguf"] and lines[2].startswith('TEMPLATE """')
    assert lines[3:] == ['PARAMETER stop "</s>"', 'PARAMETER stop "a\\"b"', "PARAMETER num_ctx 4096"]
    bare = modelfile(["m.gguf"], None, template=None, tokenizer=tokenizer, stops=[], context=512, has_own=True).decode()
    assert "the GGUF's own chat template" in bare
    bare = modelfile(
        ["m.gguf"], None, template=None, tokenizer=tokenizer, stops=[], context=512, has_own=False
    ).decode()
    assert bare.count("FROM") == 1 and "TEMPLATE: the prompt is not known" in bare and bare.endswith("num_ctx 512\n")


def test_an_unknown_name_is_told_with_its_line_in_the_table() -> None:
    table = table_for_arch("llama").names
    lines = table.path.read_text(encoding="utf-8").splitlines()
    for row in table.rows:
        assert f'"{row.disk.text}"' in lines[row.line - 1], row.disk.text
    assert f"({table.path.name} line {table.rows[0].line})" in table.nearest(table.rows[0].disk.text + "x", ())
