"""What the real llama.cpp computes with our GGUF files, against transformers with the same weights."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, LlavaForConditionalGeneration

from fixtures.demo.runtimes import put_class_token_last
from tests.interop.conftest import Converter, gap
from tests.interop.llama_cpp import LlamaCpp, llm_file, mmproj_file
from tests.interop.peer_programs import in_peer
from tests.interop.wide_models import IMAGE

pytestmark = pytest.mark.peers

MARKER = "<__media__>"
QUESTION = "What is in this picture?"
CAPTION = "a red sun over green hills"
TEXT = "What is there: a cat, 12345 red boats, naïve 图片 and a house\n\n in the picture?"
TEXT_MODELS = ("tiny", "wide", "tied", "scaled-rope", "narrow", "own-head-size", "llama-3")


def prompt(picture: str) -> str:
    """Llama-3's prompt as xtuner trains it, with BOS, and with `picture` for the picture."""
    return (
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{picture}\n{QUESTION}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def reference(folder: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def with_class_token_last(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Compute as the stock runtime does."""
    put_class_token_last(model)
    return model


@cache
def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def ids_of(folder: Path, text: str) -> list[int]:
    ids: list[int] = tokenizer_of(folder).encode(text, add_special_tokens=False)
    return ids


@torch.inference_mode()
def text_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    found: torch.Tensor = reference(folder)(input_ids=torch.tensor([ids])).logits[0]
    return found


@torch.inference_mode()
def answer(
    model: LlavaForConditionalGeneration,
    folder: Path,
    picture: Path,
    count: int,
    around: list[list[int]] | None = None,
) -> tuple[Any, list[int]]:
    """The rows that stand for the picture, and greedy ids until one that ends the turn.

    `around` are the ids before and after the picture, else those of `prompt`.
    """
    rgb = Image.open(picture).convert("RGB")
    pixels = CLIPImageProcessor.from_pretrained(folder)(rgb, return_tensors="pt")["pixel_values"]
    features = model.get_image_features(pixel_values=pixels)
    # Its form changes between releases of transformers: a tensor, a list of them, or an output that holds either.
    features = getattr(features, "pooler_output", features)
    rows = features[0] if isinstance(features, (list, tuple)) or features.dim() == 3 else features
    before, after = around or [ids_of(folder, part) for part in prompt("<image>").split("<image>")]
    ids = torch.tensor([[*before, *[model.config.image_token_index] * len(rows), *after]])
    given = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    written = model.generate(**given, do_sample=False, max_new_tokens=count)[0, ids.shape[1] :]
    return rows, written.tolist()


def hard_strings(count: int) -> list[str]:
    """Texts where tokenizers part: runs of spaces, digits and line ends, contractions, scripts, combining marks."""
    pieces = [
        *("the", " the", "The", "THE", "naïve", "straße", "İstanbul", "ǅ", "don't", "I'LL", "we’ve", "'s", "'S"),
        *("1", "12", "345", "6789", "3.14", "٣٤٥", "½", "²", " ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", " \n "),
        *("\u00a0", "\u3000", "\u200b", "\ufeff", "。", "，", "图片", "描述一下", "こんにちは", "한국어", "हिन्दी"),
        *("ไทย", "العربية", "עברית", "é", "e\u0301", "ﬁ", "\u212b", "🙂", "👩\u200d👩\u200d👧", "🇫🇷", "𝔘"),
        *("!", "?!", "...", "--", "_", "#", "<", ">", "{}", "[]", "\\", "/", "@a.b", "http://x.y/z?q=1"),
        *("def f(x):", "x_y", "a" * 16, "\x7f", "\u2028", "▁", "Ġ", "<|eot_id", "</", "<s", "[INST]"),
    ]
    chance = random.Random(11)
    return [*pieces, *("".join(chance.choices(pieces, k=chance.randint(2, 9))) for _ in range(count - len(pieces)))]


@pytest.fixture
def picture(tiny: Path, tmp_path: Path) -> Path:
    """The demo's picture at exactly the tower's size, where llama.cpp and transformers prepare it alike."""
    place = tmp_path / "picture.png"
    Image.open(tiny / "picture.png").convert("RGB").resize((IMAGE, IMAGE), Image.Resampling.BICUBIC).save(place)
    np.save(tmp_path / "picture.npy", np.asarray(Image.open(place)))
    return place


def divergence(ours: np.ndarray, theirs: torch.Tensor) -> float:
    """The largest Kullback-Leibler divergence of ours from the reference over the positions, in nats."""
    one, other = torch.from_numpy(ours).double().log_softmax(-1), theirs.double().log_softmax(-1)
    return float((other.exp() * (other - one)).sum(-1).max())


# Float types by the largest difference of a logit, where logits have a standard deviation of about 1; measured at most
# 6e-6, 3.2e-3, 0.025. f32: the order of additions. f16, bf16: llama.cpp rounds what it multiplies with such a weight
# to the weight's type.
FLOATS = {"f32": 1e-5, "f16": 5e-3, "bf16": 0.05}
# The others by divergence, measured at most 9e-4, 7e-3, 1.5e-2, 0.044, 0.098, 0.15, 0.39. Their bytes are held to
# llama-quantize's elsewhere; this sees what a wrong scale or a misplaced row does, which costs more than 1. Random
# weights are the worst case, since no logit stands out.
QUANTISED = {"q8_0": 2e-3, "q6_k": 1.5e-2, "q5_k_m": 3e-2, "q4_k_m": 0.1, "q4_0": 0.2, "q3_k_m": 0.3, "q2_k": 0.8}
# The trained model has larger weights in rows of 64 and 128, so that a rounding counts for more: measured 6e-6,
# 6.9e-3, 0.077; 4.9e-3 nats in q8_0. Fewer bits are not for a model so small: 0.3 and more.
TRAINED_FLOATS = {"f32": 1e-5, "f16": 1e-2, "bf16": 0.15}
TRAINED_QUANTISED = {"q8_0": 1e-2}
# Rows of a picture, relative to the largest: the projector's GELU is the tanh form there and erf here, and both of the
# runtime's GELUs are looked up in tables of half precision. Measured at most 1.2e-3.
ROWS_F32, ROWS_F16 = 2e-3, 3e-3


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_logits(converted: Converter, llama_cpp: LlamaCpp, name: str) -> None:
    dtype = "bfloat16" if name == "llama-3" else "float16"
    floats, quantised = (TRAINED_FLOATS, TRAINED_QUANTISED) if name == "tiny" else (FLOATS, QUANTISED)
    outtypes = ("f32", "bf16") if name == "llama-3" else (*floats, *quantised)
    folder = converted(name, "hf", dtype=dtype)
    ours = converted.onward(folder, "gguf", outtype=",".join(outtypes), part="llm")
    ids = ids_of(folder, "<|begin_of_text|>" + TEXT)
    asked = {t: {"kind": "logits", "model": llm_file(ours, t), "ids": ids} for t in outtypes}
    found = llama_cpp.ask(**asked)
    wanted = text_logits(folder, ids)
    assert {t: found[t]["array"].shape for t in outtypes} == dict.fromkeys(outtypes, tuple(wanted.shape))
    off = {t: float(np.abs(found[t]["array"] - wanted.numpy()).max()) for t in outtypes if t in floats}
    assert {t: value for t, value in off.items() if value > floats[t]} == {}
    worse = {t: divergence(found[t]["array"], wanted) for t in outtypes if t in quantised}
    assert {t: value for t, value in worse.items() if value > quantised[t]} == {}


def test_scaled_rope_is_seen(converted: Converter, llama_cpp: LlamaCpp) -> None:
    """Without the factors the logits are others by far, so the test above tests them."""
    folder = converted("scaled-rope", "hf", dtype="float32")
    ours = converted.onward(folder, "gguf", outtype="f32", part="llm")
    ids = ids_of(folder, "<|begin_of_text|>" + TEXT)
    found = llama_cpp.ask(text={"kind": "logits", "model": llm_file(ours, "f32"), "ids": ids})["text"]["array"]
    model = reference(folder)
    rotary = [module for name, module in model.named_modules() if name.endswith("rotary_emb")]
    size = model.config.text_config.hidden_size // model.config.text_config.num_attention_heads
    rotary[0].inv_freq = 10000.0 ** -(torch.arange(0, size, 2).float() / size)
    with torch.inference_mode():
        unscaled = model(input_ids=torch.tensor([ids])).logits[0]
    assert float(np.abs(found - unscaled.numpy()).max()) > 0.05


@pytest.mark.parametrize("name", ["tiny", "wide", "narrow"])
def test_picture(converted: Converter, llama_cpp: LlamaCpp, picture: Path, name: str) -> None:
    """Stock against a reference with the runtime's defect, repaired against the model as it was trained."""
    folder = converted(name, "hf", dtype="float32")
    ours = converted.onward(folder, "gguf", outtype="f32", mmproj_outtype="f32,f16")
    wanted = {
        "stock": answer(with_class_token_last(reference(folder)), folder, picture, 12),
        "repaired": answer(reference(folder), folder, picture, 12),
    }
    task = {
        "kind": "picture",
        "model": llm_file(ours, "f32"),
        "picture": picture.with_suffix(".npy"),
        "prompt": prompt(MARKER),
        "count": 12,
    }
    for runtime, (rows, ids) in wanted.items():
        found = llama_cpp.ask(runtime, **{t: {**task, "mmproj": mmproj_file(ours, t)} for t in ("f32", "f16")})
        for outtype, tolerance in (("f32", ROWS_F32), ("f16", ROWS_F16)):
            one = found[outtype]
            assert one["around"] == [ids_of(folder, part) for part in prompt("<image>").split("<image>")]
            assert gap(torch.from_numpy(one["array"]), rows) <= tolerance, (runtime, outtype)
            assert one["ids"] == ids, (runtime, outtype)
    off = gap(wanted["stock"][0], wanted["repaired"][0])
    assert off > 20 * ROWS_F16  # the two differ by far more than what is allowed


def test_trained_model_answers_and_ends_its_turn(converted: Converter, llama_cpp: LlamaCpp, picture: Path) -> None:
    """Straight from the checkpoint: it says what it was taught, and stops at the end of its turn."""
    ours = converted("tiny", "gguf", outtype="f16,q8_0")
    task = {
        "kind": "picture",
        "mmproj": mmproj_file(ours, "f16"),
        "picture": picture.with_suffix(".npy"),
        "prompt": prompt(MARKER),
        "count": 40,
    }
    found = llama_cpp.ask("repaired", **{t: {**task, "model": llm_file(ours, t)} for t in ("f16", "q8_0")})
    for outtype in ("f16", "q8_0"):
        assert found[outtype]["text"] == f"{CAPTION}<|eot_id|>"
        assert found[outtype]["complaints"] == []


@pytest.mark.parametrize("name", ["tiny", "llama-3", "sentencepiece"])
def test_tokenizer_encodes_as_transformers_does(
    converted: Converter, llama_cpp: LlamaCpp, name: str, tmp_path: Path
) -> None:
    """The reference is an older transformers, which reads a SentencePiece model by itself."""
    folder = converted(name, "hf", dtype="bfloat16")
    ours = converted.onward(folder, "gguf", outtype="bf16", part="llm")
    texts = hard_strings(240)
    task = {"kind": "tokenize", "model": llm_file(ours, "bf16"), "texts": texts}
    found = llama_cpp.ask(hard=task)["hard"]["ids"]
    wanted = in_peer("transformers-4.57", "encode_hf.py", {"folder": str(folder), "texts": texts}, tmp_path)["ids"]
    assert [pair for pair in zip(texts, found, wanted, strict=True) if pair[1] != pair[2]] == []


@pytest.mark.parametrize("name", ["tiny", "wide", "llama-3"])
@pytest.mark.parametrize("via", ["pth", "hf"])
def test_every_stop_id_ends_a_turn(converted: Converter, llama_cpp: LlamaCpp, name: str, via: str) -> None:
    folder = converted(name, "hf", dtype="float32")
    if via == "pth":
        ours = converted(name, "gguf", outtype="f32")
    else:
        ours = converted.onward(folder, "gguf", outtype="f32", part="llm")
    model = llm_file(ours, "f32")
    tokenizer = tokenizer_of(folder)
    stops = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    texts = [TEXT, prompt(""), "<|eot_id|><|end_of_text|>"]
    found = llama_cpp.ask(
        about={"kind": "vocabulary", "model": model}, ids={"kind": "tokenize", "model": model, "texts": texts}
    )
    assert found["about"]["ends"] == sorted(stops)
    assert found["about"]["bos"] == tokenizer.bos_token_id and found["about"]["add_bos"]
    assert found["about"]["eos"] == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert found["ids"]["ids"] == [ids_of(folder, text) for text in texts]
    assert found["about"]["complaints"] == []


def test_a_split_file_is_the_whole_one(converted: Converter, llama_cpp: LlamaCpp) -> None:
    """llama.cpp finds the other parts by the name of the first."""
    whole = llm_file(converted("tiny", "gguf", outtype="f16"), "f16")
    parts = sorted(converted("tiny", "gguf", outtype="f16", max_shard_size="100KB").glob("*-f16-0*-of-*.gguf"))
    assert len(parts) > 2
    ids = [1, 2, 3, 4]
    asked = {name: {"kind": "logits", "model": m, "ids": ids} for name, m in (("whole", whole), ("split", parts[0]))}
    found = llama_cpp.ask(**asked)
    assert np.array_equal(found["whole"]["array"], found["split"]["array"])
    assert np.ptp(found["whole"]["array"]) > 1
