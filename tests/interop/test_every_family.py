"""Every family of language models that has a table: what it says of a picture, before and after, and in llama.cpp.

The source is a tiny model that transformers builds and saves; of InternLM and InternLM2, of which it has no class, a
checkpoint of xtuner's, and their own forward (test_internlm.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

import llava_convert
from llava_convert.core.errors import UnsupportedError
from llava_convert.model.checkpoint import LLM
from llava_convert.model.tables.families import architectures
from tests.interop.conftest import Converter
from tests.interop.fact_models import FAMILY, Made, write
from tests.interop.llama_cpp import LlamaCpp, llm_file, mmproj_file, tensors
from tests.interop.test_internlm import CONFIGS, checkpoint, forward, made
from tests.interop.test_llama_cpp import MARKER, prompt
from tests.interop.test_llama_cpp import ids_of as ids_of_text

TOKENS = 20
TABLES = {table.model_types[0]: table for table in architectures().values() if table.part == LLM}
OF_THEIR_OWN = ("internlm", "internlm2")
# llama.cpp multiplies the features of a picture as it does those of words.
NO_PICTURES_IN_GGUF = ("gemma2",)
# Square, wide, tall, tiny, huge.
SIZES = ((56, 56), (170, 40), (31, 140), (3, 2), (900, 700))
PATCHES = (56 // 14) ** 2  # LLaVA 1.5's CLIPVisionTower.num_patches, of a picture of any size


def source_of(family: str, folder: Path, converted: Converter, tiny: Path) -> Path:
    """A LLaVA of the family. One without a tiny model fails here."""
    if family in OF_THEIR_OWN:
        return checkpoint(folder / "source", tiny, family)
    return write(folder / "source", converted("tiny", "hf"), Made(family=family))


@torch.inference_mode()
def written(folder: Path, before: list[int], after: list[int], pixels: torch.Tensor | None) -> list[int]:
    """Greedy ids by transformers, none of which ends the turn; a picture stands between the two texts."""
    # The other implementation of attention leaves Gemma-2's soft caps out.
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    features = 0 if pixels is None else PATCHES
    ids = torch.tensor([[*before, *[model.config.image_token_index] * features, *after]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seen = {} if pixels is None else {"pixel_values": pixels}
    found = model.eval().generate(**given, **seen, do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS)
    answer: list[int] = found[0, ids.shape[1] :].tolist()
    assert len(answer) == TOKENS
    return answer


@torch.inference_mode()
def written_by_its_own(family: str, before: list[int], ends: set[int]) -> list[int]:
    """Greedy ids by the family's own forward, none of which ends the turn."""
    state = made(CONFIGS[family])
    words = state["model.tok_embeddings.weight" if family == "internlm2" else "model.embed_tokens.weight"]
    text = list(before)
    for _ in range(TOKENS):
        last = forward(state, CONFIGS[family], words[torch.tensor(text)])[-1]
        last[sorted(ends)] = -torch.inf
        text.append(int(last.argmax()))
    return text[-TOKENS:]


@pytest.mark.parametrize("family", TABLES)
def test_twenty_tokens_through_every_layout(
    converted: Converter, tiny: Path, pixels: torch.Tensor, tmp_path: Path, family: str
) -> None:
    """One after the other: the family's own layouts, each from the one before, and transformers' at the end."""
    table = TABLES[family]
    source = source_of(family, tmp_path, converted, tiny)
    through = ["xtuner", *(["official"] if table.official else [])]
    through += ["gguf"] if family not in NO_PICTURES_IN_GGUF else []
    at = source
    for to in [*through, "hf"]:
        more = {"outtype": "f32", "mmproj_outtype": "f32"} if to == "gguf" else {"dtype": "float32"}
        more |= {"visual_encoder": str(tiny / "vit")} if at.name == "xtuner" and family in OF_THEIR_OWN else {}
        llava_convert.convert(at, to=to, out=tmp_path / to, **more)
        at = tmp_path / to
    before, after = [448], list(range(300, 331))
    if family in OF_THEIR_OWN:
        ends = json.loads((at / "generation_config.json").read_text())["eos_token_id"]
        stops = set(ends) if isinstance(ends, list) else {ends}
        assert written(at, before, after, None) == written_by_its_own(family, before + after, stops)
        return
    wanted = written(source, before, after, pixels)
    assert written(at, before, after, pixels) == wanted
    assert len(set(wanted)) > 3  # no model that says one word


@pytest.mark.peers
@pytest.mark.parametrize("family", [name for name in TABLES if name not in (*OF_THEIR_OWN, *NO_PICTURES_IN_GGUF)])
def test_twenty_tokens_in_llama_cpp(
    converted: Converter, llama_cpp: LlamaCpp, tiny: Path, tmp_path: Path, family: str
) -> None:
    source = source_of(family, tmp_path, converted, tiny)
    ours = converted.onward(source, "gguf", outtype="f32", mmproj_outtype="f32")
    picture = np.random.default_rng(4).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    np.save(tmp_path / "picture.npy", picture)
    task = {
        "kind": "picture", "model": llm_file(ours, "f32"), "mmproj": mmproj_file(ours, "f32"),
        "picture": tmp_path / "picture.npy", "prompt": prompt(MARKER), "count": TOKENS,
    }  # fmt: skip
    found = llama_cpp.ask("repaired", seen=task)["seen"]
    before, after = (ids_of_text(source, part) for part in prompt("<image>").split("<image>"))
    assert found["around"] == [before, after]
    processor = AutoProcessor.from_pretrained(source)
    pixels = processor.image_processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    wanted = written(source, before, after, pixels)
    assert found["ids"] == wanted


@pytest.mark.peers
@pytest.mark.parametrize("family", OF_THEIR_OWN)
def test_twenty_tokens_of_text_in_llama_cpp(
    converted: Converter, llama_cpp: LlamaCpp, tiny: Path, tmp_path: Path, family: str
) -> None:
    """Of those without a class in transformers."""
    source = source_of(family, tmp_path, converted, tiny)
    assert asked(converted, llama_cpp, source) == written_by_its_own(family, TEXT, set())


TEXT = [448, *range(300, 331)]


def asked(converted: Converter, llama_cpp: LlamaCpp, source: Path) -> list[int]:
    """What llama.cpp writes after TEXT with the language model of a source."""
    ours = converted.onward(source, "gguf", outtype="f32", part="llm")
    task = {"kind": "generate", "model": llm_file(ours, "f32"), "ids": TEXT, "count": TOKENS}
    found: list[int] = llama_cpp.ask(text=task)["text"]["ids"]
    return found


def with_head(folder: Path, converted: Converter, family: str, tied: bool) -> Path:
    head = {"tie_word_embeddings": tied}
    return write(folder, converted("tiny", "hf"), Made(head, text=head, family=family))


@pytest.mark.peers
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILY)
def test_a_head_tied_or_not_in_llama_cpp(
    converted: Converter, llama_cpp: LlamaCpp, tmp_path: Path, family: str, tied: bool
) -> None:
    """Its architectures differ in whether they take the embedding for a head, and whether they read one at all."""
    source = with_head(tmp_path / "source", converted, family, tied)
    if (family, tied) == ("gemma2", False):
        with pytest.raises(UnsupportedError, match="uses the embedding as the head"):
            asked(converted, llama_cpp, source)
        return
    assert asked(converted, llama_cpp, source) == written(source, TEXT, [], None)


def test_a_tied_head_where_the_runtime_wants_one(converted: Converter, tmp_path: Path) -> None:
    """StableLM's is written from the embedding; the model is still the same, and comes back."""
    source = with_head(tmp_path / "source", converted, "stablelm", True)
    llava_convert.convert(source, to="gguf", out=tmp_path / "gguf", outtype="f32,q4_0", verify="full")
    found = tensors(next((tmp_path / "gguf").glob("gguf-f32.gguf")))
    assert found["output.weight"].data == found["token_embd.weight"].data
    file = tmp_path / "gguf" / "gguf-f32.gguf"
    assert llava_convert.verify(source, file)
    llava_convert.convert(file, to="hf", out=tmp_path / "hf", dtype="float32")
    first, last = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "hf"))
    words = "language_model.model.embed_tokens.weight"
    assert torch.equal(last[words][:576], first[words])


def test_a_head_that_the_runtime_does_not_read(converted: Converter, tmp_path: Path) -> None:
    source = with_head(tmp_path / "source", converted, "gemma2", False)
    with pytest.raises(UnsupportedError, match="a separate output head") as refused:
        llava_convert.convert(source, to="gguf", out=tmp_path / "gguf", part="llm")
    assert refused.value.exit_code == 4 and "xtuner" in str(refused.value.hint)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_tokens_of_a_picture_of_any_size(converted: Converter, tmp_path: Path, tower: str) -> None:
    """Of LLaVA 1.5: from official's folder, through GGUF, by the processor that transformers makes of the output."""
    strategy = {"vision_feature_select_strategy": "full"} if tower == "siglip" else {}
    source = write(tmp_path / "source", converted("tiny", "hf"), Made(strategy, tower=tower))
    for through in ("official", "gguf"):
        more = {"outtype": "f32", "mmproj_outtype": "f32"} if through == "gguf" else {"dtype": "float32"}
        llava_convert.convert(source, to=through, out=tmp_path / through, **more)
        back = llava_convert.convert(tmp_path / through, to="hf", out=tmp_path / f"{through}-hf", dtype="float32").out
        processor = AutoProcessor.from_pretrained(str(back))
        told = json.loads((tmp_path / f"{through}-hf" / "config.json").read_text())["image_token_index"]
        for width, height in SIZES:
            picture = Image.fromarray(np.full((height, width, 3), 90, dtype=np.uint8))
            ids = processor(text="<image>\nWhat is it?", images=picture, return_tensors="pt")["input_ids"]
            assert int((ids == told).sum()) == PATCHES, (through, width, height)


@pytest.mark.peers
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_tokens_of_a_picture_in_llama_cpp(
    converted: Converter, llama_cpp: LlamaCpp, tmp_path: Path, tower: str
) -> None:
    strategy = {"vision_feature_select_strategy": "full"} if tower == "siglip" else {}
    source = write(tmp_path / "source", converted("tiny", "hf"), Made(strategy, tower=tower))
    ours = converted.onward(source, "gguf", outtype="f32", mmproj_outtype="f32")
    tasks = {}
    for width, height in SIZES:
        file = tmp_path / f"{width}x{height}.npy"
        np.save(file, np.full((height, width, 3), 90, dtype=np.uint8))
        tasks[f"{width}x{height}"] = {
            "kind": "picture", "model": llm_file(ours, "f32"), "mmproj": mmproj_file(ours, "f32"), "picture": file,
            "prompt": prompt(MARKER), "count": 1,
        }  # fmt: skip
    found = llama_cpp.ask(**tasks)
    assert {name: len(one["array"]) for name, one in found.items()} == dict.fromkeys(tasks, PATCHES)
