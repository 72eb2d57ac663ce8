"""Make the models on the spot: random values in the real shapes, written as fast as the disk takes them.

Values are one block of normal numbers used again and again: what a conversion does to them does not depend on how
often they repeat, and making 4 GB of fresh ones would take longer than the whole benchmark.
"""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count, product
from math import prod
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import LLAVA_8B, LORA_ALPHA, LORA_RANK, Shape, Shapes, shape_for

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TILE = 1 << 24
# A multiple of the tile's size would give every tensor the same rows.
STEP = 7_777_777

CONFIG = """
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor, CLIPVisionModel
from xtuner.model import LLaVAModel
from xtuner.utils import PROMPT_TEMPLATE

prompt_template = PROMPT_TEMPLATE.llama3_chat
tokenizer = dict(
    type=AutoTokenizer.from_pretrained,
    pretrained_model_name_or_path='{llm}',
    trust_remote_code=True,
    padding_side='right')
image_processor = dict(
    type=CLIPImageProcessor.from_pretrained, pretrained_model_name_or_path='{tower}', trust_remote_code=True)
model = dict(
    type=LLaVAModel,
    freeze_llm=False,
    freeze_visual_encoder=True,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path='{llm}'),
    visual_encoder=dict(type=CLIPVisionModel.from_pretrained, pretrained_model_name_or_path='{tower}'),
    visual_encoder_lora=dict(type=LoraConfig, r={rank}, lora_alpha={alpha}, lora_dropout=0.05, bias='none'))
"""
PREPROCESSOR = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 336},
}


class Values:
    """Endless weights of one dtype."""

    def __init__(self, dtype: str) -> None:
        generator = torch.Generator().manual_seed(1)
        tile = (torch.randn(TILE, generator=generator) * 0.02).to(DTYPES[dtype])
        self.tile = torch.cat([tile, tile])
        self.at = 0

    def pieces(self, count: int) -> Iterator[torch.Tensor]:
        """The next `count` values, in flat pieces that are not to be written to."""
        while count:
            size = min(TILE, count)
            yield self.tile[self.at : self.at + size]
            self.at = (self.at + STEP) % TILE
            count -= size

    def tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor with memory of its own, as a trained one has."""
        return torch.cat([torch.empty(0, dtype=self.tile.dtype), *self.pieces(prod(shape))]).view(shape)

    def named(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """As `tensor`, but ones for a norm's weight: with values around zero, a model is taken for a delta."""
        if len(shape) == 1 and name.endswith(".weight"):
            return torch.ones(shape, dtype=self.tile.dtype)
        return self.tensor(shape)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def header_of(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> tuple[bytes, int]:
    """A safetensors header, tensors in order of name as `save_file` writes them, and the size of the data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in sorted(shapes):
        end = at + prod(shapes[name]) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, at


def write_safetensors(path: Path, shapes: Shapes, dtype: str, values: Values | None) -> None:
    """Write the tensors; without values the file is all hole after its header."""
    header, size = header_of(shapes, dtype)
    with path.open("wb") as file:
        file.write(header)
        if values is None:
            file.truncate(len(header) + size)
            return
        for name in sorted(shapes):
            file.write(values.named(name, shapes[name]).view(-1).view(torch.uint8).numpy().data)


def write_shards(folder: Path, shapes: Shapes, dtype: str, limit: int, values: Values | None) -> None:
    """`model-0000i-of-0000n.safetensors` and the index, filled in module order."""
    itemsize = DTYPES[dtype].itemsize
    groups: list[Shapes] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = prod(shape) * itemsize
        if groups[-1] and filled + size > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += size
    where: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_safetensors(folder / file, group, dtype, values)
        where |= dict.fromkeys(group, file)
    total = sum(prod(shape) for shape in shapes.values()) * itemsize
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _alphabet() -> list[str]:
    """The 256 characters by which byte-level BPE stands for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = count(256)
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def write_tokenizer(folder: Path, tokens: int) -> None:
    """A byte-level BPE tokenizer of `tokens` tokens which libraries load, as large as a real one of that many."""
    alphabet = _alphabet()
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    vocab, merges = list(alphabet), []
    pairs: Iterable[tuple[str, str]] = product(alphabet, alphabet)
    for left, right in pairs:
        if len(vocab) == tokens - len(specials):
            break
        vocab.append(left + right)
        merges.append(f"{left} {right}")
    for left, right in product([a + b for a, b in product(alphabet, alphabet)], alphabet):
        if len(vocab) == tokens - len(specials):
            break
        vocab.append(left + right)
        merges.append(f"{left} {right}")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": len(vocab) + i, "content": text, **flags} for i, text in enumerate(specials)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {text: i for i, text in enumerate(vocab)},
        "merges": merges,
    }
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
    }
    content |= {"pre_tokenizer": level, "post_processor": level, "decoder": level, "model": model}
    write_json(folder / "tokenizer.json", content)
    config = {
        "added_tokens_decoder": {str(a["id"]): {k: v for k, v in a.items() if k != "id"} for a in added},
        "bos_token": specials[0],
        "eos_token": specials[2],
        "clean_up_tokenization_spaces": True,
        "model_max_length": 8192,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", config)


Shaped = Callable[[int, int, int], Shape]
"""A shape for so many bytes; of the LLM's and of the tower's weights, how many each takes."""


def make_official(folder: Path, nbytes: int, dtype: str, shaped: Shaped = shape_for) -> None:
    """An official LLaVA of one 16-bit dtype with its tower, in about four shards."""
    shape = shaped(nbytes, 2, 2)
    write_official(folder, shape, dtype, nbytes // 4, Values(dtype))
    write_tower_config(folder / "tower", shape)


def write_tower_config(folder: Path, shape: Shape) -> None:
    """What an official LLaVA names and does not carry; here nothing is fetched."""
    folder.mkdir()
    write_json(folder / "config.json", shape.tower_config())
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)


def make_header_only(folder: Path) -> None:
    """LLaVA-Llama-3-8B as official layout: real headers, the data a hole."""
    write_official(folder, LLAVA_8B, "F16", 5 * 10**9, None)


def write_official(folder: Path, shape: Shape, dtype: str, limit: int, values: Values | None) -> None:
    tower = {f"model.vision_tower.vision_tower.{name}": s for name, s in shape.tower().items()}
    projector = {f"model.mm_projector.{name}": s for name, s in shape.projector().items()}
    write_shards(folder, {**shape.llm(), **tower, **projector}, dtype, limit, values)
    config = shape.llm_config({"F16": "float16", "BF16": "bfloat16"}[dtype]) | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": shape.tower_config()["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    write_tokenizer(folder, shape.vocab)


def make_tower(folder: Path, shape: Shape) -> None:
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", shape.tower(), "F32", Values("F32"))
    write_json(folder / "config.json", shape.tower_config())
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)


def make_bases(folder: Path, shape: Shape, *, llm_weights: bool = False) -> str:
    """`llm` and `vit`, the two bases, and `config.py`, the config of a training that began with them: its text.

    The base LLM is its config and tokenizer only, unless a peer needs its weights too.
    """
    make_tower(folder / "vit", shape)
    llm = folder / "llm"
    llm.mkdir()
    write_json(llm / "config.json", shape.llm_config("bfloat16"))
    write_json(llm / "generation_config.json", {"bos_token_id": shape.vocab - 3, "eos_token_id": shape.vocab - 2})
    write_tokenizer(llm, shape.vocab)
    if llm_weights:
        write_shards(llm, shape.llm(), "BF16", 5 * 10**9, Values("BF16"))
    text = CONFIG.format(llm="llm", tower="vit", rank=LORA_RANK, alpha=LORA_ALPHA)
    (folder / "config.py").write_text(text, encoding="utf-8")
    return text


def meta(config: str) -> dict[str, Any]:
    """What mmengine saves beside the weights, as far as a conversion reads it."""
    return {"cfg": config, "epoch": 0, "iter": 1}


def make_pth(folder: Path, nbytes: int, dtype: str, shaped: Shaped = shape_for, *, llm_weights: bool = False) -> None:
    """`iter_1.pth` with a full LLM of `dtype`, a ViT LoRA and a projector in float32, beside the two bases.

    Pickle and base tower together take about `nbytes`.
    """
    shape = shaped(nbytes, DTYPES[dtype].itemsize, 4)
    config = make_bases(folder, shape, llm_weights=llm_weights)
    values, wide = Values(dtype), Values("F32")
    state = OrderedDict((name, wide.tensor(s)) for name, s in shape.adapters().items())
    state |= {f"llm.{name}": values.named(name, s) for name, s in shape.llm().items()}
    torch.save({"meta": meta(config), "state_dict": state}, folder / "iter_1.pth")


def made(folder: Path, make: Any, *args: Any, **more: Any) -> Path:
    """`folder`, made by `make` unless an earlier run finished it."""
    done = folder / ".made"
    if not done.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder, *args, **more)
        done.touch()
    return folder
