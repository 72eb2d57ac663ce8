"""The corpus that fuzzing starts from: tiny valid files, and the faults of the fault list; made anew, none kept."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llava_convert.storage.gguf.file import Typed, encode_gguf
from llava_convert.storage.safetensors import encode_header

TINY = Path(__file__).resolve().parents[2] / "fixtures" / "tiny"
Seeds = dict[str, bytes]  # a name that begins with "valid" is of an input which must be taken
PART = b"\0\xff\0"  # between the files of an input that is several


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


# -- safetensors


def shard(names: tuple[str, ...] = ("a.weight",)) -> bytes:
    header = encode_header([(name, "F16", (2, 2)) for name in names])
    return header.data + bytes(header.size - len(header.data))


def _with_header(header: object, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else _json(header)
    return len(text).to_bytes(8, "little") + text + data


def safetensors_seeds() -> Seeds:
    def entry(dtype: object = "F32", shape: object = (4,), span: object = (0, 16)) -> dict[str, object]:
        return {"dtype": dtype, "shape": shape, "data_offsets": span}

    mixed = encode_header([("scalar", "F64", ()), ("none", "I8", (0, 3)), ("b", "BF16", (2, 3)), ("é", "BOOL", (5,))])
    return {
        "valid": shard(("a.weight", "b.weight")),
        "valid-mixed": mixed.data + bytes(mixed.size - len(mixed.data)),
        "valid-metadata": _with_header({"__metadata__": {"format": "pt"}, "x": entry()}),
        "overlap": _with_header({"x": entry(), "y": entry(span=(8, 24))}, bytes(24)),
        "hole": _with_header({"x": entry(), "y": entry(span=(20, 36))}, bytes(36)),
        "overflow": _with_header({"x": entry(shape=(2**40, 2**40))}),
        "bool": _with_header({"x": entry(shape=(True, 4))}),
        "dtype": _with_header({"x": entry(dtype="F4")}),
        "name": _with_header({"../x\x1b[2J": entry()}),
        "twice": _with_header(b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"x":1}'),
        "deep": _with_header(b"[" * 3000),
        "digits": _with_header(b'{"x":' + b"9" * 5000 + b"}"),
        "huge": (2**63).to_bytes(8, "little") + b"{}",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "page": b"<!DOCTYPE html><html>",
        "empty": b"",
    }


SHARDS = {"model-00001-of-00002.safetensors": ("a",), "model-00002-of-00002.safetensors": ("b", "c")}


def index_seeds() -> Seeds:
    right = {name: shard for shard, names in SHARDS.items() for name in names}
    one, _ = SHARDS

    def index(**changes: object) -> bytes:
        return _json({"metadata": {"total_size": 24}, "weight_map": right | changes})

    return {
        "valid": index(),
        "valid-plain": _json({"weight_map": right}),
        "valid-size": _json({"metadata": {"total_size": "x"}, "weight_map": right}),
        "wrong-shard": index(b=one),
        "extra": index(d=one),
        "missing": index(a="model-00003-of-00002.safetensors"),
        "outside": index(a="../x.safetensors"),
        "absolute": index(a="/etc/passwd"),
        "windows": index(a="C:\\x.safetensors"),
        "number": index(a=1),
        "torch": index(a="model.bin"),
        "itself": index(a="model.safetensors.index.json"),
        "folder": index(a="folder.safetensors"),
        "surrogate": b'{"weight_map": {"\\ud800": "\\ud800.safetensors"}}',
        "nan": b'{"weight_map": NaN}',
        "bom": b"\xef\xbb\xbf{}",
    }


# -- GGUF


def _gguf(metadata: Mapping[str, Typed], *tensors: tuple[str, str, tuple[int, ...]], alignment: int = 32) -> bytes:
    header = encode_gguf(metadata, tensors, alignment=alignment)
    return header.data + bytes(header.size - len(header.data))


def gguf_part(number: int) -> bytes:
    """One of the two parts of a split model."""
    told = {"split.no": Typed("u16", number), "split.count": Typed("u16", 2), "split.tensors.count": Typed("i32", 2)}
    name = {"general.architecture": Typed("str", "llama")} if number == 0 else {}
    return _gguf(name | told, (f"part.{number}", "F16", (2, 2)))


def gguf_seeds() -> Seeds:
    kinds = {
        "u": Typed("u8", 1), "h": Typed("i16", -1), "I": Typed("u32", 7), "q": Typed("i64", -1), "f": Typed("f32", 0.5),
        "d": Typed("f64", 0.1), "t": Typed("bool", True), "s": Typed("str", "é"), "S": Typed("[str]", ("a", "", "bc")),
        "B": Typed("[u8]", (1,)), "F": Typed("[f32]", (1.0, -2.0)), "T": Typed("[bool]", (True, False)),
        "E": Typed("[i32]", ()),
    }  # fmt: skip
    types = ("Q4_K", "BF16", "IQ1_M", "I64", "TQ2_0")
    one = _gguf({"s": Typed("str", "x")}, ("a", "F32", (2, 3)), ("b", "Q8_0", (2, 32)))
    value = one.index(b"\1\0\0\0\0\0\0\0x")
    info = one.index(b"\1\0\0\0\0\0\0\0a\2\0\0\0")

    def changed(at: int, data: bytes) -> bytes:
        return one[:at] + data + one[at + len(data) :]

    return {
        "valid": one,
        "valid-kinds": _gguf(kinds),
        "valid-types": _gguf({}, *((dtype.lower(), dtype, (1, 256)) for dtype in types)),
        "valid-aligned": _gguf({}, ("a", "I8", (3,)), ("b", "I8", ()), ("c", "F64", (0, 3)), alignment=256),
        "valid-part": gguf_part(0),
        "valid-version": changed(4, b"\2"),
        "version": changed(4, b"\1"),
        "big-endian": changed(4, b"\0\0\0\3"),
        "tensors": changed(8, (2**40).to_bytes(8, "little")),
        "keys": changed(16, (2**40).to_bytes(8, "little")),
        "length": changed(value, (2**63).to_bytes(8, "little")),
        "kind": changed(value - 4, b"\x09\0\0\0\x09\0\0\0"),
        "dimensions": changed(info + 9, b"\5"),
        "overflow": changed(info + 13, b"\xff" * 8),
        "type": changed(info + 29, b"\x1f"),
        "blocks": changed(info + 29, b"\x08"),
        "offset": changed(info + 33, b"\x20"),
        "other-part": gguf_part(1),
        "older": b"lmgg" + bytes(60),
    }


# -- torch


def _saved(value: object, *, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def _pickle_of(saved: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        return next(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))


def torch_zip(pickled: bytes, storages: int = 8, size: int = 128) -> bytes:
    """A zip as torch.save makes it, around any pickle, whose CRC-32 then is right."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/byteorder", b"little")
        for key in range(storages):
            archive.writestr(f"x/data/{key}", bytes(size))
    return stream.getvalue()


@cache
def _states() -> dict[str, Any]:
    base = torch.arange(12, dtype=torch.float32)
    wrapped = OrderedDict((f"module.{n}", torch.zeros(2, dtype=torch.float16)) for n in "ab")
    return {
        "plain": OrderedDict(w=base.view(3, 4), b=torch.zeros((), dtype=torch.bfloat16)),
        "views": {"t": base.view(3, 4).t(), "s": base[2:5], "e": base[:1].expand(4, 3), "z": torch.zeros(0, 3)},
        "wrapped": {"state_dict": wrapped, "meta": {"epoch": 1, "cfg": "model = dict()\n"}, "message_hub": {"x": [1]}},
        "parameter": {"p": torch.nn.Parameter(torch.ones(3)), "size": torch.Size([1, 2])},
        "integers": {"i": torch.ones(2, dtype=torch.int64), "q": torch.ones(2, dtype=torch.uint8), "k": base.double()},
    }


def _hostile() -> dict[str, bytes]:
    """Pickles that would do harm where they were unpickled, and bombs."""

    class Runs:
        def __init__(self, function: Any, *arguments: object) -> None:
            self.made = (function, arguments)

        def __reduce__(self) -> Any:
            return self.made

    import os

    nested = b"]" * 400 + b"a" * 399
    return {
        "system": pickle.dumps(Runs(os.system, "touch canary"), 2),
        "eval": pickle.dumps({"x": Runs(eval, "open('canary', 'w')")}, 4),
        "getattr": b"cbuiltins\ngetattr\n(cbuiltins\nlist\nX\x06\0\0\0appendtR.",
        "global-line": b"cos\nsystem\n(S'touch canary'\ntR.",
        "inst": b"(S'touch canary'\nios\nsystem\n.",
        "memo": b"\x80\x02]r\xff\xff\xff\x7f.",
        "long": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "text": b"\x80\x04\x8d" + b"\xff" * 8 + b".",
        "deep": nested + b".",
        "self": b"]q\x00h\x00a.",
        "laughs": b"]q\x00" + b"".join(b"(h\x00h\x00lq\x00" for _ in range(60)) + b".",
        "extension": b"\x82\x01.",
        "persistent": b"\x80\x02N\x51.",
        "surrogate": b"V\\ud800\n.",
        "escape": b"S'\\x1b[2J\\n'\n.",
    }


def _plain_pickles() -> dict[str, bytes]:
    value = {
        "a": [1, 2.5, None, True, 2**70],
        "t": (1, "é", b"\0"),
        "s": {1, 2},
        "f": frozenset("ab"),
        3: bytearray(b"x"),
    }
    return {f"valid-{protocol}": pickle.dumps(value, protocol) for protocol in range(6)} | {
        "valid-class": pickle.dumps(OrderedDict(a=complex(1, 2), b=slice(1, 2), c=range(3)), 4),
    }


def unpickle_seeds() -> Seeds:
    return _plain_pickles() | _hostile() | {f"state-{n}": _pickle_of(_saved(v)) for n, v in _states().items()}


def torch_zip_seeds() -> Seeds:
    """Whole archives, and pickles alone, which the target puts into one."""
    small = {name: _saved(value) for name, value in _states().items()}
    pickles = {f"valid-pickle-{name}": _pickle_of(saved) for name, saved in small.items()}
    broken = bytearray(small["plain"])
    broken[broken.find(b"PK\x01\x02") + 10] = 8  # says that its first record is compressed
    faults = {"truncated": small["plain"][:-30], "compressed": bytes(broken), "short": b"PK\x03\x04"}
    hostile = {name: data for name, data in _hostile().items()}
    return {f"valid-{name}": saved for name, saved in small.items()} | pickles | faults | hostile


def legacy_seeds() -> Seeds:
    made = {f"valid-{name}": _saved(value, legacy=True) for name, value in _states().items()}
    plain = made["valid-plain"]
    return made | {
        "truncated": plain[:-3],
        "trailing": plain + b"x",
        "tar": bytes(257) + b"ustar" + bytes(8),
        "empty": b"",
    }


# -- DeepSpeed


@cache
def zero_files(stage: int) -> dict[str, bytes]:
    """The pickles of a checkpoint of two ranks: 13 trained elements, one frozen parameter, a buffer, a tied name."""
    ranks, shapes = 2, OrderedDict(w=torch.Size([3, 3]), v=torch.Size([4]))
    parts = [5 + 2, 5 + 2] if stage == 3 else [7, 6]
    hollow = stage == 3
    module = OrderedDict((name, torch.zeros(0 if hollow else tuple(shape))) for name, shape in shapes.items())
    module |= {"tied": torch.zeros(0 if hollow else (4,)), "frozen": torch.zeros(0 if hollow else (3,))}
    model = {
        "module": module | {"buffer": torch.ones(2)}, "buffer_names": ["buffer"], "param_shapes": [shapes],
        "frozen_param_shapes": {"frozen": torch.Size([3])},
        "frozen_param_fragments": {"frozen": torch.ones(2 if hollow else 3)}, "shared_params": {"tied": "v"},
        "dp_world_size": ranks, "global_steps": 3, "skipped_steps": 1, "meta": {"cfg": "model = dict()\n"},
        "ds_config": {"zero_optimization": {"stage": stage}, "bf16": {"enabled": False}},
    }  # fmt: skip
    files = {}
    for rank in range(ranks):
        key = "fp32_flat_groups" if hollow else "single_partition_of_fp32_groups"
        state = {
            key: [torch.zeros(parts[rank])], "zero_stage": stage, "partition_count": ranks if hollow else [ranks],
            "base_optimizer_state": {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1}]},
        }  # fmt: skip
        files[f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] = {"optimizer_state_dict": state}
        if hollow:
            files[f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"] = model
    if not hollow:
        files["mp_rank_00_model_states.pt"] = model
    return {name: _pickle_of(_saved(files[name])) for name in sorted(files)}


def zero_seeds() -> Seeds:
    """A byte which says which file of which folder, and that file's pickle; or the text of `latest`."""
    made: Seeds = {}
    for stage in (2, 3):
        for number, (name, pickled) in enumerate(zero_files(stage).items()):
            made[f"valid-{stage}-{name}"] = bytes([(stage == 3) * 8 + number]) + pickled
    other = zero_files(3)["zero_pp_rank_1_mp_rank_00_optim_states.pt"]
    return made | {
        "valid-latest": b"\x07save\n", "outside": b"\x07../save", "nul": b"\x07\0", "nothing": b"\x07",
        "mixed": b"\x01" + other, "system": b"\x00" + _hostile()["system"],
    }  # fmt: skip


# -- texts


CONFIG = b"""\
# Copyright (c) OpenMMLab. All rights reserved.
import torch
from mmengine.config import read_base
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel
from xtuner.model import LLaVAModel
from xtuner.utils import PROMPT_TEMPLATE

llm_name_or_path = 'meta-llama/Meta-Llama-3-8B-Instruct'
prompt_template = PROMPT_TEMPLATE.llama3_chat
max_length = int(2048 - (336 / 14)**2)
lr, betas = 2e-4, (0.9, *[0.999])
tokenizer = dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=llm_name_or_path)
model = dict(
    type=LLaVAModel, freeze_llm=True, pretrained_pth=None,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=llm_name_or_path,
             torch_dtype=torch.float16),
    visual_encoder=dict(type=CLIPVisionModel.from_pretrained, pretrained_model_name_or_path=f'{"openai"}/clip'),
    llm_lora=LoraConfig(r=8, lora_alpha=16, target_modules=['q_proj'], task_type='CAUSAL_LM'))
llava_dataset = dict(tokenizer=tokenizer, template_map_fn=dict(template=prompt_template), pad_image_to_square=True)
train_dataloader = dict(dataset=llava_dataset, batch_size=4 if max_length > 0 else 1)
custom_hooks = [dict(type=name, every=i * 2) for i, name in enumerate(['a', 'b']) if i]
for key, value in dict(a=1).items():
    model[key] = value
custom_hooks += [dict(x='%s-{}'.format(1))]
del model['a']
"""
_INHERITS = b"""\
_base_ = './base.py'
model = dict(freeze_llm=False, llm=dict(_delete_=True, type='x'))
with read_base():
    from .base import *
"""


def config_seeds() -> Seeds:
    snippets = {
        "power": b"x = 9**9**9\n",
        "shift": b"x = 1 << 10**9\n",
        "times": b"x = 'a' * 10**9\ny = [0] * 10**9\n",
        "format": b"x = f'{1:>999999999}'\ny = '{:999999999}'.format(1)\nz = '%999999999d' % 1\n",
        "laughs": b"a = [1]\n" + b"a = [a, a, a]\n" * 40 + b"b = str(a)\n",
        "nest": b"x = " + b"[" * 90 + b"]" * 90 + b"\n",
        "deep": b"x = " + b"-" * 1000 + b"1\n",
        "self": b"a = []\na.append(a)\nmodel = dict(type='LLaVAModel')\nmodel['llm'] = model\nb = str(a)\n",
        "insides": b"x = ().__class__.__bases__[0].__subclasses__()\n",
        "code": b"import os\nos.system('touch canary')\nx = eval('1')\nexec('y = 1')\nopen('canary', 'w')\n",
        "loop": b"for i in range(10**9):\n    for j in range(10**9):\n        x = i\n",
        "while": b"while True: pass\ndef f(): return f()\nx = f()\n",
        "join": b"a = 'x' * 99999\nb = a.join([a] * 9999)\nc = a.replace('x', a)\n",
        "escape": b"model = dict(type='\\x1b[2J\\n\\ud800')\n",
        "nul": b"x = '\0'\n",
        "coding": b"# -*- coding: utf-7 -*-\nx = 1\n",
        "regex": b"import re\nx = re.sub('(a+)+$', '', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaa!')\n",
    }
    return {"valid": CONFIG, "inherits": _INHERITS} | snippets


def pieces(*texts: str) -> bytes:
    return b"".join(_field(1, _field(1, text.encode()) + b"\x15\0\0\0\0\x18\x01") for text in texts)


def _field(number: int, payload: bytes) -> bytes:
    return bytes([number << 3 | 2, len(payload)]) + payload


def sentencepiece_seeds() -> Seeds:
    return {
        "valid": pieces("<unk>", "<s>", "</s>", "▁a", "b") + _field(2, b"\x08\x01"),
        "tiktoken": b"IQ== 0\nIg== 1\n",
        "textless": _field(1, b"\x18\x01"),
        "varint": b"\x0a" + b"\xff" * 12,
        "fixed": b"\x0d\0\0",
        "group": b"\x0b\x0c",
    }


def tokenizer_seeds() -> Seeds:
    """Files of a folder, each behind the byte which is its place in `tokens.FILES`."""
    from llava_convert.assets.tokenizer.files import FILES

    def folder(**files: object) -> bytes:
        named = {name.replace(".", "_"): number for number, name in enumerate(FILES)}
        parts = []
        for name, content in files.items():
            parts.append(bytes([named[name]]) + (content if isinstance(content, bytes) else _json(content)))
        return PART.join(parts)

    added = {"id": 3, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    fast = {
        "version": "1.0", "added_tokens": [added | {"special": True}], "pre_tokenizer": {"type": "ByteLevel"},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}]},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    }  # fmt: skip
    config = {
        "added_tokens_decoder": {"3": {"content": "<s>", "special": True}}, "bos_token": "<s>", "eos_token": None,
        "tokenizer_class": "LlamaTokenizer", "chat_template": [{"name": "default", "template": "{{ x }}"}],
        "extra_special_tokens": ["<x>"],
    }  # fmt: skip
    unigram = {"model": {"vocab": [["<unk>", 0.0], ["a", -1.5]]}, "added_tokens": []}
    special = {"bos_token": {"content": "<s>", "lstrip": False}, "pad_token": "b"}
    return {
        "valid": folder(tokenizer_json=fast, tokenizer_config_json=config, special_tokens_map_json=special),
        "valid-unigram": folder(tokenizer_json=unigram),
        "valid-pieces": folder(
            tokenizer_model=pieces("<unk>", "<s>", "</s>"), tokenizer_config_json={"add_bos_token": True}
        ),
        "valid-slow": folder(vocab_json={"a": 0, "b": 1}, merges_txt=b"#version\na b\n", added_tokens_json={"<x>": 2}),
        "valid-template": folder(
            vocab_json={"a": 0}, chat_template_jinja=b"{{ y }}", chat_template_json={"chat_template": "z"}
        ),
        "types": folder(tokenizer_json={"added_tokens": {}, "model": [], "post_processor": {"single": 1}}),
        "ids": folder(vocab_json={"a": "x", "b": None}, tokenizer_config_json={"added_tokens_decoder": {"x": 1}}),
        "deep": folder(vocab_json={"a": 0}, tokenizer_config_json=b"[" * 3000),
        "nested": folder(tokenizer_json={"post_processor": _nested(300), "pre_tokenizer": _nested(300)}),
        "nested-config": folder(vocab_json={"a": 0}, tokenizer_config_json={"x": _nested(300)}),
        "more": folder(vocab_json={"a": 0}, tokenizer_json={"added_tokens": [{**added, "more": 1}], "model": {}}),
        "bytes": folder(vocab_json=b"\xff", chat_template_jinja=b"\xff"),
        "surrogate": folder(vocab_json=b'{"\\ud800": 0}', tokenizer_config_json=b'{"chat_template": "\\ud800"}'),
        "nothing": b"",
    }


def _nested(depth: int) -> dict[str, object]:
    """Sequences of sequences, shallow enough for a parser and too deep for what goes by its calls."""
    inner: dict[str, object] = {}
    for _ in range(depth):
        inner = {"type": "Sequence", "processors": [inner]}
    return inner


def architecture_seeds() -> Seeds:
    llm = json.loads((TINY / "llm" / "config.json").read_text(encoding="utf-8"))
    vit = json.loads((TINY / "vit" / "config.json").read_text(encoding="utf-8"))
    rope = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}

    def changed(base: Mapping[str, object], **changes: object) -> bytes:
        return _json({**base, **changes})

    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {
        "valid": _json(llm),
        "valid-vit": _json(vit),
        "valid-phi3": _json({"model_type": "phi3", **sizes, **heads}),
        "valid-qwen2": _json({"model_type": "qwen2", **sizes, **heads}),
        "valid-siglip": _json({"model_type": "siglip_vision_model"}),
        "valid-new": changed(
            {k: v for k, v in llm.items() if k != "torch_dtype"}, dtype="float16", rope_parameters=rope
        ),
        "layers": changed(llm, num_hidden_layers=10**30),
        "many": changed(llm, num_hidden_layers=500),
        "negative": changed(llm, num_hidden_layers=-1),
        "float": changed(llm, hidden_size=64.0),
        "text": changed(llm, hidden_size="64"),
        "list": changed(llm, model_type=["llama"], vocab_size=[]),
        "patch": changed(vit, patch_size=0),
        "rest": changed(vit, image_size=57),
        "rope": changed(llm, rope_parameters=[], rope_scaling=3),
        "nested": changed(llm, x=_nested(300)),
        "other": _json({"model_type": "mamba\x1b[2J"}),
        "null": _json({"model_type": None}),
        "array": b"[]",
    }
