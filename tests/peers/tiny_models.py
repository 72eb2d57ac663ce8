"""Tiny base models, tokenizers and pictures for xtuner to train on, made inside the xtuner environment.

Llama: hidden 64, 2 layers, 4 heads, 2 kv heads, mlp 128. CLIP: hidden 32, 3 layers, patch 14, image 56. Every
parameter gets noise on top of its initial value: untouched norms are all one and untouched biases all zero, and then
a swapped pair goes unseen.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

BEGIN, END_OF_TEXT, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
# The order of Llama-3's own special tokens, with fewer reserved ones.
SPECIAL_TOKENS = (
    BEGIN,
    END_OF_TEXT,
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    END_OF_TURN,
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 64)),
)
# Llama-3's pre-tokenizer.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
WORDS = (
    "describe this picture please answer the question about a cat house river table bird grass tree people naïve sky "
    "small green red there what near three two with mountain window yellow morning children market bicycle umbrella "
    "don't we'll it's 照片 图片 描述 一下 这张 12 345 image of on in and is are café straße"
)
PICTURES = 8
IMAGE_SIZE = 56


@dataclass(frozen=True)
class Base:
    """What sets one pair of base models apart from the plain one.

    rows: rows of the embedding when more than the tokens. shard: the largest shard of the LLM, in transformers'
    notation. safetensors: False writes pytorch_model.bin files. whole_clip: the tower is stored inside a CLIPModel
    with its text half.
    """

    tokens: int = 512
    rows: int | None = None
    dtype: torch.dtype = torch.bfloat16
    tied: bool = False
    shard: str = "5GB"
    safetensors: bool = True
    whole_clip: bool = False


def _noisy(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


def make_tokenizer(tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly `tokens` tokens, specials last, as Llama-3 has them."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    source = random.Random(0)
    corpus = [" ".join(source.choices(WORDS.split(), k=12)) for _ in range(400)]
    trainer = trainers.BpeTrainer(
        vocab_size=tokens - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    template = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN}:1 $B:1", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    if tokenizer.get_vocab_size() != tokens:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, wanted {tokens}: add words")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END_OF_TURN,
        chat_template=CHAT_TEMPLATE,
        model_max_length=8192,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=True,
    )


def _write_llm(base: Base, target: Path, tokenizer_from: Path | None) -> None:
    if tokenizer_from is not None and len(PreTrainedTokenizerFast.from_pretrained(tokenizer_from)) == base.tokens:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_from)
    else:
        tokenizer = make_tokenizer(base.tokens)
    end_of_text, end_of_turn = tokenizer.convert_tokens_to_ids([END_OF_TEXT, END_OF_TURN])
    config = LlamaConfig(
        vocab_size=base.rows or base.tokens,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_of_text,
        tie_word_embeddings=base.tied,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    _noisy(model, seed=2)
    model.to(base.dtype)
    # As Llama-3-Instruct: a second stop token and sampling settings that live in this file only.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[end_of_text, end_of_turn],
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        max_length=4096,
    )
    model.save_pretrained(target, max_shard_size=base.shard, safe_serialization=base.safetensors)
    tokenizer.save_pretrained(target)


def _write_visual_encoder(base: Base, target: Path) -> None:
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": 14,
        "image_size": IMAGE_SIZE,
        "projection_dim": 32,
    }
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "projection_dim": 32,
        "bos_token_id": 62,
        "eos_token_id": 63,
    }
    torch.manual_seed(3)
    model: nn.Module
    if base.whole_clip:
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=tower, projection_dim=32))
    else:
        model = CLIPVisionModel(CLIPVisionConfig(**tower))
    _noisy(model, seed=4)
    model.save_pretrained(target, safe_serialization=base.safetensors)
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ).save_pretrained(target)


def _write_data(target: Path) -> None:
    source = random.Random(5)
    target.mkdir(parents=True)
    items = []
    for index in range(PICTURES):
        width, height = source.choice([(72, 56), (56, 80), (64, 64)])
        Image.frombytes("RGB", (width, height), source.randbytes(3 * width * height)).save(target / f"{index}.png")
        answer = " ".join(source.choices(WORDS.split(), k=12)) + "."
        turns = [{"from": "human", "value": "<image>\ndescribe this picture"}, {"from": "gpt", "value": answer}]
        items.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    (target / "train.json").write_text(json.dumps(items))


def write_base(base: Base, target: Path, tokenizer_from: Path | None = None) -> None:
    """Write `target/{llm,vit,data}` anew, with the tokenizer of `tokenizer_from` where its size is the wanted one."""
    shutil.rmtree(target, ignore_errors=True)
    _write_llm(base, target / "llm", tokenizer_from)
    _write_visual_encoder(base, target / "vit")
    _write_data(target / "data")
