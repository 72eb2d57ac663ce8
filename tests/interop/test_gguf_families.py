"""Every family that GGUF holds, in the real llama.cpp and back again: logits, tokenizers, stops, round trips."""

from __future__ import annotations

import json
import shutil
import tomllib
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration

import llava_convert
from llava_convert.core.resources import data_dir
from tests.interop.conftest import Converter, gap
from tests.interop.llama_cpp import PRE, LlamaCpp, differing, llm_file, metadata, mmproj_file, tensors
from tests.interop.made_tokenizers import MADE, ByteLevel
from tests.interop.peer_programs import in_peer
from tests.interop.test_gguf_against_llama_cpp import unequal
from tests.interop.test_gguf_round_trip import SHAPING, weights
from tests.interop.test_llama_cpp import (
    FLOATS,
    MARKER,
    ROWS_F32,
    answer,
    hard_strings,
    picture,
    reference,
    with_class_token_last,
)
from tests.interop.wide_models import WIDES

pytestmark = pytest.mark.peers
__all__ = ["picture"]  # a fixture

FAMILIES = (
    "biased", "linear-rope", "yarn-rope", "yarn-attention", "sentencepiece", "llama-2", "llama-2-json", "vicuna",
    "smollm", "mistral", "mistral-window", "qwen2", "qwen2-tied", "qwen2-yarn", "phi-3", "phi-3-shared", "phi-3-long",
    "phi-4", "qwen3", "qwen3-tied", "vicuna-13b",
)  # fmt: skip
# Turns as these models write them, and tokens with what may stand around them.
TURNS = (
    "<|user|>\nWhat is it?<|end|>\n<|assistant|>\nA cat<|end|>\n<|endoftext|>  x",
    "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat<|im_end|><tool_call> x</s>  y",
    "<s>[INST] What is it? [/INST] A cat</s> [INST]a[/INST]",
    "USER: What is it? ASSISTANT: A cat</s>USER: \n ASSISTANT:",
    "<|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>",
)


def ids_for(name: str, count: int) -> list[int]:
    return np.random.default_rng(count).integers(3, WIDES[name].rows, count).tolist()


@torch.inference_mode()
def expected_logits(folder: Path, ids: list[int]) -> np.ndarray:
    found: np.ndarray = reference(folder)(input_ids=torch.tensor([ids])).logits[0].numpy()
    return found


def language_model(converted: Converter, name: str, outtype: str) -> Path:
    folder = converted(name, "hf", dtype="float16")
    return llm_file(converted.onward(folder, "gguf", outtype="f32,f16", part="llm"), outtype)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(converted: Converter, llama_cpp: LlamaCpp, name: str) -> None:
    """Measured at most 6.3e-6 and 3.4e-3, where logits have a standard deviation of about one."""
    ids = ids_for(name, 48)
    asked = {t: {"kind": "logits", "model": language_model(converted, name, t), "ids": ids} for t in ("f32", "f16")}
    found = llama_cpp.ask(**asked)
    wanted = expected_logits(converted(name, "hf", dtype="float16"), ids)
    assert 0.8 < wanted.std() < 1.2
    off = {t: float(np.abs(found[t]["array"] - wanted).max()) for t in asked}
    assert {t: value for t, value in off.items() if value > FLOATS[t]} == {}


@pytest.mark.parametrize("name", ["phi-3-long", "phi-4", "yarn-rope", "qwen2-yarn", "linear-rope"])
def test_logits_of_long_texts(converted: Converter, llama_cpp: LlamaCpp, name: str) -> None:
    """Beyond the length of the first training: longrope takes its other factors, here and there.

    Angles grow with the position, and their float32's rounding with them: measured at most 1.3e-5.
    """
    ids = ids_for(name, 300)
    task = {"kind": "logits", "model": language_model(converted, name, "f32"), "ids": ids}
    wanted = expected_logits(converted(name, "hf", dtype="float16"), ids)
    assert np.abs(llama_cpp.ask(long=task)["long"]["array"] - wanted).max() <= 3 * FLOATS["f32"]


@pytest.mark.parametrize("name", ["mistral-window", "phi-3"])
def test_a_window_shows_behind_it_alone(converted: Converter, llama_cpp: LlamaCpp, name: str, tmp_path: Path) -> None:
    """What the conversion warns of: the runtime looks back at everything."""
    width = WIDES[name].settings["sliding_window"]
    assert [f"more than {width} tokens" in line for line in warnings(converted, name, tmp_path)] == [True]
    ids = ids_for(name, 300)
    task = {"kind": "logits", "model": language_model(converted, name, "f32"), "ids": ids}
    off = np.abs(
        llama_cpp.ask(long=task)["long"]["array"] - expected_logits(converted(name, "hf", dtype="float16"), ids)
    ).max(axis=1)
    assert off[:width].max() <= 3 * FLOATS["f32"] < 0.05 < off[width + 1 :].max()


def warnings(converted: Converter, name: str, place: Path) -> tuple[str, ...]:
    """Of the conversion of a language model to GGUF."""
    folder = converted(name, "hf", dtype="float16")
    report = llava_convert.convert(folder, to="gguf", out=place / "planned", part="llm", dry_run=True)
    return tuple(report.warnings)


def as_the_runtime_reads(texts: list[str], tokenizer: str) -> list[str]:
    """Of texts those, in that form, which llama.cpp cuts as the tokenizer: it normalises none, and of combining marks
    it knows nothing in the pre-tokenizers whose patterns name them (\\p{M}).
    """
    made = MADE.get(tokenizer)
    if isinstance(made, ByteLevel) and made.normalizer == "NFC":
        return [unicodedata.normalize("NFC", text) for text in texts]
    if isinstance(made, ByteLevel) and "\\p{M}" in (made.split or ""):
        return [text for text in texts if not marked(text)]
    return texts


def marked(text: str) -> bool:
    return any(unicodedata.category(char).startswith("M") for char in text)


def encoded(folder: Path, texts: list[str], place: Path) -> list[list[int]]:
    found: list[list[int]] = in_peer(
        "transformers-4.57", "encode_hf.py", {"folder": str(folder), "texts": texts}, place
    )["ids"]
    return found


@pytest.mark.parametrize(
    "name", ["sentencepiece", "llama-2", "llama-2-json", "vicuna", "smollm", "qwen2", "phi-3", "phi-3-long", "phi-4"]
)
def test_tokenizers(converted: Converter, llama_cpp: LlamaCpp, name: str, tmp_path: Path) -> None:
    folder = converted(name, "hf", dtype="float16")
    texts = as_the_runtime_reads([*hard_strings(240), *TURNS], WIDES[name].tokenizer)
    assert len(texts) >= 205
    task = {"kind": "tokenize", "model": language_model(converted, name, "f32"), "texts": texts}
    found = llama_cpp.ask(hard=task)["hard"]["ids"]
    wanted = encoded(folder, texts, tmp_path)
    assert [pair for pair in zip(texts, found, wanted, strict=True) if pair[1] != pair[2]] == []


def pre_tokenizers() -> dict[str, dict[str, Any]]:
    text = (data_dir("mappings") / "gguf" / "pre_tokenizers.toml").read_text(encoding="utf-8")
    return {row["name"]: row for row in tomllib.loads(text)["pre"]}


@pytest.mark.parametrize("name", sorted(pre_tokenizers()))
def test_pre_tokenizers(converted: Converter, llama_cpp: LlamaCpp, name: str, tmp_path: Path) -> None:
    """Each row of the table: under its name llama.cpp cuts as its patterns do in tokenizers."""
    row = pre_tokenizers()[name]
    folder = shutil.copytree(converted("qwen2", "hf", dtype="float16"), tmp_path / "hf")
    made = MADE["qwen2"]
    config = {k: v for k, v in made.config.items() if k != "tokenizer_class"} | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }
    for old in folder.glob("*token*.json"):
        old.unlink()
    ByteLevel(made.added, made.stops, made.template, config, made.begin, split=made.split).write(folder)  # type: ignore[attr-defined]
    content = json.loads((folder / "tokenizer.json").read_text())
    cuts = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        for split in row["splits"]
    ]
    last = content["pre_tokenizer"]["pretokenizers"][-1]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*cuts, last]}
    content["model"]["ignore_merges"] = row.get("ignore_merges", False)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    file = llm_file(converted.onward(folder, "gguf", outtype="f32", part="llm"), "f32")
    assert metadata(file)["tokenizer.ggml.pre"][1] == name
    texts = [text for text in hard_strings(240) if not ("\\p{M}" in str(row) and marked(text))]
    assert len(texts) >= 200
    found = llama_cpp.ask(hard={"kind": "tokenize", "model": file, "texts": texts})["hard"]["ids"]
    wanted = encoded(folder, texts, tmp_path)
    assert [pair for pair in zip(texts, found, wanted, strict=True) if pair[1] != pair[2]] == []


def test_their_scores_of_a_tokenizer_json_are_none(converted: Converter, llama_cpp: LlamaCpp) -> None:
    """A Llama-2 without tokenizer.model: theirs gives every token the same score, and no text for the padded rows."""
    folder = converted("llama-2-json", "hf", dtype="float16")
    found = metadata(llama_cpp.convert(folder, "f16"))
    assert set(found["tokenizer.ggml.scores"][1]) == {-1000.0}
    assert len(found["tokenizer.ggml.tokens"][1]) < WIDES["llama-2-json"].rows


def test_a_space_at_the_beginning_alone(converted: Converter, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """`legacy` false: a text that begins with a space gets no second one, and one behind a special token none.

    The conversion warns of both.
    """
    folder = converted("once", "hf", dtype="float16")
    file = language_model(converted, "once", "f32")
    texts = [*hard_strings(240), "<s>a"]
    found = llama_cpp.ask(hard={"kind": "tokenize", "model": file, "texts": texts})["hard"]["ids"]
    wanted = encoded(folder, texts, tmp_path)
    assert ["begins with one" in line for line in warnings(converted, "once", tmp_path)] == [True]
    others = {text for text, one, other in zip(texts, found, wanted, strict=True) if one != other}
    assert others == {text for text in texts if text.startswith((" ", "▁", "<s>"))}


PROMPTS = {
    "qwen2": "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n",
    "phi-3": "<|user|>\n<image>\nWhat is it?<|end|>\n<|assistant|>\n",
    "vicuna": "USER: <image>\nWhat is it? ASSISTANT:",
    "mistral": "[INST] <image>\nWhat is it? [/INST]",
}


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_pictures(converted: Converter, llama_cpp: LlamaCpp, picture: Path, name: str, tmp_path: Path) -> None:
    """Stock against a reference with the runtime's defect, repaired against the model as it was trained."""
    folder = converted(name, "hf", dtype="float32")
    ours = converted.onward(folder, "gguf", outtype="f32", mmproj_outtype="f32")
    ids = encoded(folder, [PROMPTS[name]], tmp_path)[0]
    place = ids.index(json.loads((folder / "config.json").read_text())["image_token_index"])
    around = [ids[:place], ids[place + 1 :]]
    task = {
        "kind": "picture",
        "model": llm_file(ours, "f32"),
        "mmproj": mmproj_file(ours, "f32"),
        "picture": picture.with_suffix(".npy"),
        "prompt": PROMPTS[name].replace("<image>", MARKER),
        "count": 12,
    }
    for runtime, changed in (("stock", with_class_token_last), ("repaired", lambda model: model)):
        rows, written = answer(changed(reference(folder)), folder, picture, 12, around)
        found = llama_cpp.ask(runtime, one=task)["one"]
        assert found["around"] == around
        assert gap(torch.from_numpy(found["array"]), rows) <= ROWS_F32
        assert found["ids"] == written, runtime


# Beside its own stops, what ends a text of the runtime's by its name.
MORE_ENDS = {"phi-3": ["</s>"], "phi-3-long": ["</s>"]}


@pytest.mark.parametrize("name", ["llama-2", "vicuna", "smollm", "mistral", "qwen2", "phi-3", "phi-3-long", "phi-4"])
def test_stops(converted: Converter, llama_cpp: LlamaCpp, name: str) -> None:
    made = MADE[WIDES[name].tokenizer]
    folder = converted(name, "hf", dtype="float16")
    about = llama_cpp.ask(about={"kind": "vocabulary", "model": language_model(converted, name, "f32")})["about"]
    tokens = metadata(language_model(converted, name, "f32"))["tokenizer.ggml.tokens"][1]
    stops = {*made.stops, *MORE_ENDS.get(name, [])} | ({"<|endoftext|>"} if name == "smollm" else set())
    assert {tokens[i] for i in about["ends"]} == stops
    assert tokens[about["eos"]] == made.config["eos_token"]
    assert tokens[about["bos"]] == made.begin and about["add_bos"] is (made.config.get("add_bos_token") is True)
    assert about["tokens"] == json.loads((folder / "config.json").read_text())["vocab_size"]
    assert about["template"] == (folder / "chat_template.jinja").read_text()


# What a config says of how the model computes, beside SHAPING.
MORE_SHAPING = ("rope_theta", "sliding_window", "partial_rotary_factor", "original_max_position_embeddings")


@pytest.mark.parametrize("outtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(converted: Converter, name: str, outtype: str, tmp_path: Path) -> None:
    """hf → gguf → hf, of the GGUF files alone: tensors, what the config computes with, tokenizer, stops, template."""
    dtype = {"f32": "float32", "bf16": "bfloat16"}[outtype]
    before = converted(name, "hf", dtype=dtype)
    between = converted.onward(before, "gguf", outtype=outtype, mmproj_outtype=outtype)
    (between / "conversion.json").unlink(missing_ok=True)
    after = converted.onward(llm_file(between, outtype), "hf")
    one, other = weights(before), weights(after)
    assert sorted(one) == sorted(other)
    changed = {key for key in one if one[key].dtype != other[key].dtype or not torch.equal(one[key], other[key])}
    assert changed == {f"vision_tower.vision_model.post_layernorm.{kind}" for kind in ("weight", "bias")}
    old, new = (json.loads((folder / "config.json").read_text())["text_config"] for folder in (before, after))
    # A Mistral that looks back at everything is a Llama: the same tensors, the same computation.
    kinds = (old["model_type"], new["model_type"])
    assert kinds in [(old["model_type"],) * 2, *([("mistral", "llama")] * (old.get("sliding_window") is None))]
    shaping = (*SHAPING, *MORE_SHAPING)
    assert {k: new.get(k) for k in shaping if k in old} == {k: old[k] for k in shaping if k in old}
    assert scaling(new) == scaling(old)
    stops = [json.loads((f / "generation_config.json").read_text())["eos_token_id"] for f in (before, after)]
    assert as_set(stops[1]) == as_set(stops[0])
    templates = [(folder / "chat_template.jinja").read_text() for folder in (before, after)]
    assert templates[1] == templates[0]
    texts = [*hard_strings(240), *TURNS, "<image>\nWhat is it?"]
    assert encoded(after, texts, tmp_path) == encoded(before, texts, tmp_path)


def scaling(config: dict[str, Any]) -> dict[str, Any] | None:
    """A rope scaling by its numbers in float32, which is what a GGUF holds and what models compute in."""
    found = config.get("rope_scaling")
    if found is None:
        return None
    kind = found.get("rope_type") or found["type"]
    rest = {key: value for key, value in found.items() if key not in ("type", "rope_type")}
    return {"type": kind, **{k: np.float32(v).tolist() for k, v in rest.items()}}


def as_set(stops: int | list[int]) -> set[int]:
    return set(stops) if isinstance(stops, list) else {stops}


def test_a_released_llava_llama_3(converted: Converter, llama_cpp: LlamaCpp) -> None:
    """The vocabulary that xtuner's converter leaves: <unk>, <image> and <pad> behind Llama-3's, rows to 128320."""
    folder = converted("llama-3", "hf", dtype="bfloat16")
    config = json.loads((folder / "config.json").read_text())
    assert (config["vocab_size"], config["image_token_index"], config["pad_token_id"]) == (128320, 128257, 128258)
    file = llm_file(converted.onward(folder, "gguf", outtype="bf16", part="llm"), "bf16")
    found = metadata(file)
    tokens, types = found["tokenizer.ggml.tokens"][1], found["tokenizer.ggml.token_type"][1]
    assert tokens[128256:128260] == ["<unk>", "<image>", "<pad>", "[PAD128259]"] and tokens[-1] == "[PAD128319]"
    assert types[:128000] == [1] * 128000 and types[128000:128259] == [3] * 259 and types[128259:] == [5] * 61
    assert len(tokens) == len(types) == 128320
    about = llama_cpp.ask(about={"kind": "vocabulary", "model": file})["about"]
    assert (about["bos"], about["eos"], about["add_bos"]) == (128000, 128009, True)
    assert about["ends"] == [128001, 128009] and about["complaints"] == []


@pytest.mark.parametrize(
    "name", ["biased", "yarn-rope", "vicuna", "smollm", "mistral", "qwen2-tied", "qwen3-tied", "phi-3", "phi-4"]
)
def test_their_files_come_back(converted: Converter, llama_cpp: LlamaCpp, name: str, tmp_path: Path) -> None:
    """A language model that their converter wrote, as those that are published are, for transformers again."""
    before = converted(name, "hf", dtype="bfloat16")
    theirs = llama_cpp.convert(before, "bf16", pre=PRE.get(WIDES[name].tokenizer))
    after = converted.onward(theirs, "hf")
    one = {key.removeprefix("language_model."): value for key, value in weights(before).items() if "language" in key}
    other = weights(after)
    if WIDES[name].tied:  # a language model alone holds both names of the one tensor
        one["lm_head.weight"] = one["model.embed_tokens.weight"]
    assert sorted(one) == sorted(other)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    config = json.loads((after / "config.json").read_text())
    old = json.loads((before / "config.json").read_text())["text_config"]
    shaping = (*SHAPING, *MORE_SHAPING)
    assert {k: config.get(k) for k in shaping if k in old} == {k: old[k] for k in shaping if k in old}
    assert scaling(config) == scaling(old)
    # Nothing in it says that Phi-3's tokens take the white space behind them along, unless its name does.
    texts = [*hard_strings(240), *([] if name == "phi-3" else TURNS)]
    assert encoded(after, texts, tmp_path) == encoded(before, texts, tmp_path)


@pytest.mark.parametrize(
    "name", ["qwen2", "smollm", "phi-3-long", "phi-4", "llama-2-json", "yarn-rope", "biased", "qwen3"]
)
def test_saved_by_transformers_5(converted: Converter, name: str, tmp_path: Path) -> None:
    """Its own names of tensors and rope parameters, and fewer tokenizer files, make the same language model."""
    folder = converted(name, "hf", dtype="bfloat16")
    LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    shutil.copy(folder / "preprocessor_config.json", tmp_path / "saved")
    one, other = (
        llm_file(converted.onward(each, "gguf", outtype="bf16", part="llm"), "bf16")
        for each in (folder, tmp_path / "saved")
    )
    assert differing(tensors(other), tensors(one)) == {}
    assert list(unequal(metadata(other), metadata(one))) == []
