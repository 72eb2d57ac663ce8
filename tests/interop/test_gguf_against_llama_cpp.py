"""Our GGUF files against those that llama.cpp's own converter and quantiser make of the same model, byte for byte."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.conftest import Converter
from tests.interop.llama_cpp import (
    PRE,
    LlamaCpp,
    Value,
    differing,
    llm_file,
    metadata,
    mmproj_file,
    tensors,
)
from tests.interop.made_tokenizers import learnt_pieces, model_file
from tests.interop.wide_models import WIDES

pytestmark = pytest.mark.peers

FLOATS = ("f32", "f16", "bf16", "q8_0")
QUANTISED = (
    "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l",
    "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs",
)  # fmt: skip
CONVERTED = [
    ("tiny", "float16"), ("tiny", "bfloat16"), ("wide", "bfloat16"), ("tied", "float32"), ("scaled-rope", "bfloat16"),
    ("narrow", "float16"), ("own-head-size", "bfloat16"), ("llama-3", "bfloat16"), ("sentencepiece", "float16"),
    ("biased", "bfloat16"), ("linear-rope", "float16"), ("yarn-rope", "float16"), ("yarn-attention", "float16"),
    ("llama-2", "float16"), ("vicuna", "float16"), ("smollm", "bfloat16"), ("mistral", "bfloat16"),
    ("mistral-window", "bfloat16"), ("qwen2", "bfloat16"), ("qwen2-tied", "float16"), ("qwen2-yarn", "bfloat16"),
    ("phi-3", "bfloat16"), ("phi-3-shared", "float16"), ("phi-4", "bfloat16"), ("qwen3", "bfloat16"),
    ("qwen3-tied", "float16"), ("vicuna-13b", "float16"),
]  # fmt: skip
# Keys that may differ, each with the reason.
NAMES = {
    "general.name": "theirs is made of the folder's name, ours is --name",
    "general.tags": "theirs come from the front matter of the folder's card",
    "general.license": "from the card, as are the next ones",
    "general.base_model.count": "from the card",
    "general.languages": "from the card",
    "general.basename": "guessed from the folder's name, as are the next ones",
    "general.finetune": "guessed from the folder's name",
    "general.version": "guessed from the folder's name",
    "general.organization": "guessed from the folder's name",
}
# Keys that only ours have, each with the reason.
UNKNOWN_ID = "tokenizer.ggml.unknown_token_id"  # theirs looks it up in tokenizer.json, which the folder has not
WINDOW = "llama.attention.sliding_window"  # for the way back: the runtime's llama reads no window
ATTENTION = "llama.rope.scaling.attn_factor"  # theirs writes yarn's in yarn_attn_factor alone, which is not read
EOT = "tokenizer.ggml.eot_token_id"  # a stop id that the runtime knows neither by text nor as the EOS
OURS: dict[str, set[str]] = {
    "sentencepiece": {UNKNOWN_ID},
    "llama-2": {UNKNOWN_ID},
    "vicuna": {UNKNOWN_ID},
    "vicuna-13b": {UNKNOWN_ID},
    "mistral": {UNKNOWN_ID},
    "mistral-window": {UNKNOWN_ID, WINDOW},
    "yarn-attention": {ATTENTION},
    "phi-3": {EOT},
    "phi-3-shared": {EOT},
}
TIED = ("tied", "smollm", "qwen2-tied", "qwen3-tied", "phi-4")


def theirs(llama_cpp: LlamaCpp, folder: Path, name: str, outtype: str) -> Path:
    """Their conversion; Llama-3's vocabulary is one that their converter knows by itself, SentencePiece's any."""
    return llama_cpp.convert(folder, outtype, pre=PRE.get(WIDES[name].tokenizer if name in WIDES else "tiny"))


@pytest.mark.parametrize(("name", "dtype"), CONVERTED)
def test_tensors_of_the_converter(converted: Converter, llama_cpp: LlamaCpp, name: str, dtype: str) -> None:
    """Names, order of dimensions, types, bytes; of every float type and the one that their converter quantises to."""
    folder = converted(name, "hf", dtype=dtype)
    outtypes = FLOATS if name in ("tiny", "wide") else ("f16", "q8_0")
    ours = converted.onward(folder, "gguf", outtype=",".join(outtypes), part="llm")
    for outtype in outtypes:
        wanted = tensors(theirs(llama_cpp, folder, name, outtype))
        found = tensors(llm_file(ours, outtype))
        assert differing(found, wanted) == {}, outtype
        assert ("rope_freqs.weight" in found) == (name == "scaled-rope")
        assert ("output.weight" in found) == (name not in TIED)


def test_folders_that_their_converter_refuses(converted: Converter, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """A Phi-3 of which tokenizer.json is left; with its tokenizer.model, too, in the folder both give the same file."""
    folder = converted("phi-3-long", "hf", dtype="bfloat16")
    assert "Missing" in llama_cpp.refusal(folder, "f16") and not (folder / "tokenizer.model").exists()
    ours = converted.onward(folder, "gguf", outtype="f16,bf16,q8_0", part="llm")
    whole = shutil.copytree(folder, tmp_path / "whole")
    (whole / "tokenizer.model").write_bytes(model_file(learnt_pieces()))
    again = converted.onward(whole, "gguf", outtype="f16,bf16,q8_0", part="llm")
    for outtype in ("f16", "bf16", "q8_0"):
        wanted = llama_cpp.convert(whole, outtype)
        for folder in (ours, again):
            assert differing(tensors(llm_file(folder, outtype)), tensors(wanted)) == {}, outtype
        found = metadata(llm_file(again, outtype))
        assert found.pop(EOT) == (("UINT32",), 820)
        assert list(unequal(found, metadata(wanted))) == []
    rest = {"tokenizer.ggml.scores": "theirs are SentencePiece's, ours the order of the merges"}
    found = metadata(llm_file(ours, "f16"))
    assert {line.partition(":")[0] for line in unequal(found, metadata(llm_file(again, "f16")))} == {*rest}


def unequal(ours: dict[str, Value], others: dict[str, Value]) -> Iterator[str]:
    for key in sorted({*ours, *others} - {*NAMES}):
        if ours.get(key) != others.get(key):
            yield f"{key}: {str(ours.get(key, 'missing'))[:200]}, theirs {str(others.get(key, 'missing'))[:200]}"


@pytest.mark.parametrize(("name", "dtype"), CONVERTED)
def test_metadata_of_the_converter(converted: Converter, llama_cpp: LlamaCpp, name: str, dtype: str) -> None:
    """Every key with its type and value, but for names and for what OURS says."""
    folder = converted(name, "hf", dtype=dtype)
    outtypes = FLOATS if name in ("tiny", "wide") else ("f16", "q8_0")
    ours = converted.onward(folder, "gguf", outtype=",".join(outtypes), part="llm")
    for outtype in outtypes[-2:]:
        found, wanted = metadata(llm_file(ours, outtype)), metadata(theirs(llama_cpp, folder, name, outtype))
        more = OURS.get(name, set())
        assert more <= {*found} - {*wanted}
        assert list(unequal({key: found[key] for key in found if key not in more}, wanted)) == [], outtype


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("wide", "bfloat16"),
        ("wide", "float16"),
        ("tied", "bfloat16"),
        ("narrow", "float32"),
        ("own-head-size", "float16"),
        ("tiny", "float16"),
        ("biased", "bfloat16"),
        ("smollm", "bfloat16"),
        ("vicuna", "float16"),
        ("mistral", "bfloat16"),
        ("qwen2", "bfloat16"),
        ("qwen2-tied", "float16"),
        ("phi-3", "bfloat16"),
        ("phi-4", "bfloat16"),
        ("qwen3", "bfloat16"),
        ("vicuna-13b", "float16"),
        ("llama-3-70b", "bfloat16"),
    ],
)
def test_tensors_of_the_quantiser(converted: Converter, llama_cpp: LlamaCpp, name: str, dtype: str) -> None:
    """Type and bytes of every tensor, straight from the source in one go.

    Theirs start from the converter's f32 file, which holds every source exactly: its f16 file rounds a bfloat16 source,
    and its bf16 file a float16 one.
    """
    folder = converted(name, "hf", dtype=dtype)
    ours = converted.onward(folder, "gguf", outtype=",".join(QUANTISED), part="llm")
    exact = theirs(llama_cpp, folder, name, "f32")
    for outtype in QUANTISED:
        wanted = llama_cpp.quantize(exact, outtype)
        assert differing(tensors(llm_file(ours, outtype)), tensors(wanted)) == {}, outtype
        found = {k: v for k, v in metadata(llm_file(ours, outtype)).items() if k not in OURS.get(name, set())}
        assert list(unequal(found, metadata(wanted))) == [], outtype


@pytest.mark.parametrize("outtype", ["q8_0", "q4_0", "q4_k_m", "q6_k"])
@pytest.mark.parametrize("name", ["tiny", "wide"])
def test_mmproj_of_the_quantiser(converted: Converter, llama_cpp: LlamaCpp, name: str, outtype: str) -> None:
    """llama-quantize takes such a file too; what it does not quantise keeps its type, so it starts from our f16."""
    folder = converted(name, "hf", dtype="float16")
    ours = converted.onward(folder, "gguf", outtype="f16", mmproj_outtype=f"f16,{outtype}")
    wanted = llama_cpp.quantize(mmproj_file(ours, "f16"), outtype)
    assert differing(tensors(mmproj_file(ours, outtype)), tensors(wanted)) == {}


@pytest.mark.parametrize("name", ["tiny", "a_full_vitlora", "b_llmlora_vitlora", "d_full_fullvit"])
def test_every_layout_gives_the_same_files(converted: Converter, name: str) -> None:
    """A checkpoint, its official and its xtuner layout in float32: the same model, so the same bytes."""
    options = {"outtype": "f32,q8_0", "mmproj_outtype": "f32"}
    direct = converted(name, "gguf", **options)
    for via in ("official", "xtuner"):
        folder = converted(name, via, dtype="float32")
        # The xtuner layout names its bases as training did, which is not where the copy lies now.
        bases = converted.source(name).bases
        named = {"llm": str(bases / "llm"), "visual_encoder": str(bases / "vit"), "prompt_template": "llama3_chat"}
        again = converted.onward(folder, "gguf", **(named if via == "xtuner" else {}), **options)
        for pick, outtype in ((llm_file, "f32"), (llm_file, "q8_0"), (mmproj_file, "f32")):
            one, other = pick(direct, outtype), pick(again, outtype)
            assert differing(tensors(other), tensors(one)) == {}, (via, outtype)
            assert list(unequal(metadata(other), metadata(one))) == [], (via, outtype)
