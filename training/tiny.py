"""Tiny base models made from nothing: a tokenizer like Llama-3's, a Llama and a CLIP tower with random weights.

Configs and tokenizer files are written by hand in the form of transformers 4.x, which every version since reads; files
that 5.x saves cannot be read by 4.x.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

BOS, EOT, END = "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"
SPECIAL = (BOS, END, "<|start_header_id|>", "<|end_header_id|>", EOT)
# Llama-3's: how text is cut into words before pairs are merged.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def write_language_model(folder: Path, corpus: Iterable[str], *, tokens: int, seed: int, **sizes: int) -> None:
    """A Llama with a byte-level BPE tokenizer of `tokens` ids trained on `corpus`; `sizes` go into its config."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_level_bpe(corpus, tokens - len(SPECIAL), SPECIAL)
    write_tokenizer(tokenizer, folder, length=2048)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids[BOS],
        "eos_token_id": ids[END],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": tokens,
        **sizes,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": ids[BOS], "eos_token_id": [ids[END], ids[EOT]]})
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k != "torch_dtype"}))
    _fill(model, seed)
    write_weights(folder / "model.safetensors", model.state_dict())


def write_tower(folder: Path, *, seed: int, **sizes: int) -> None:
    """A CLIP vision tower; `sizes` go into its config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["CLIPVisionModel"],
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu",
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_channels": 3,
        "projection_dim": sizes["hidden_size"],
        "torch_dtype": "float32",
        **sizes,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", image_processor(sizes["image_size"]))
    model = CLIPVisionModel(CLIPVisionConfig(**{k: v for k, v in config.items() if k != "torch_dtype"}))
    _fill(model, seed)
    state = {n if n.startswith("vision_model.") else f"vision_model.{n}": t for n, t in model.state_dict().items()}
    write_weights(folder / "model.safetensors", {n: t for n, t in state.items() if not n.endswith("position_ids")})


def image_processor(side: int) -> dict[str, Any]:
    """CLIP's preprocessor_config.json for pictures of `side` pixels."""
    return {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": STD,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": side},
    }


def _fill(model: torch.nn.Module, seed: int) -> None:
    """Random weights by our own rule: it does not change with transformers, and a tower of three layers that stays
    frozen sees more with it than with the 0.02 that large models start from.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1 and "position" not in name and "embed_tokens" not in name:
                parameter.copy_(noise / (parameter[0].numel() ** 0.5))
            elif "embed" in name:
                parameter.copy_(noise / 4)
            else:
                parameter.fill_(float("norm" in name and name.endswith("weight")))


def byte_level_bpe(corpus: Iterable[str], size: int, special: Sequence[str]) -> Tokenizer:
    """A tokenizer of Llama-3's kind: `size` ids learnt from the corpus, then the special ones, BOS among them."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    # A corpus of few words may give fewer merges than asked for: reserved tokens fill the gap, as Llama-3 has them.
    spare = [f"<|reserved_special_token_{i}|>" for i in range(size - tokenizer.get_vocab_size())]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (*special, *spare)])
    begin = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[begin]),
        ]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, length: int) -> None:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json, for texts of at most `length` tokens."""
    content = json.loads(tokenizer.to_str())
    # tokenizers writes merges as pairs since 0.20, which older ones cannot read.
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    write_json(folder / "tokenizer.json", content)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {str(t["id"]): {"content": t["content"], **flags} for t in content["added_tokens"]},
        "bos_token": BOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": True,
        "eos_token": EOT,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {"bos_token": BOS, "eos_token": EOT})


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
