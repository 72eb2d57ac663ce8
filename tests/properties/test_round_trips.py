"""A → B → A over random small models of every family: the same tensors and small files, bit for bit.

What is written is read by the libraries of others (safetensors, torch, gguf), and compared file by file.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import llava_convert
from llava_convert.layouts.info import TARGETS

DTYPES = {"float16": ("F16", "f16"), "bfloat16": ("BF16", "bf16"), "float32": ("F32", "f32")}
# What a layout has no room for, so that it does not come back (docs/formats.md).
NO_ROOM = {"gguf": ("post_layernorm",)}
FAMILY_WORDS = {"architectures", "model_type", "language_model.model_type"}
_NAMES = ("_name_or_path", "mm_vision_tower")
WHOLE = sorted(name for name, target in TARGETS.items() if not target.adapters_alone)
ROWS = 576  # of the committed tokenizer, with `<image>` and `<pad>`, padded


@dataclass(frozen=True)
class Drawn:
    """One model, and the two layouts that it goes through."""

    family: str
    heads: int
    shared: int
    size: int
    layers: int
    mlp: int
    tied: bool
    dtype: str
    first: str
    second: str
    seed: int


DRAWN = st.builds(
    Drawn,
    family=st.sampled_from(["llama", "mistral", "qwen2", "phi3"]),
    heads=st.sampled_from([2, 4]),
    shared=st.sampled_from([1, 2]),
    size=st.sampled_from([8, 16]),
    layers=st.integers(1, 3),
    mlp=st.sampled_from([32, 48]),
    tied=st.booleans(),
    dtype=st.sampled_from(sorted(DTYPES)),
    first=st.sampled_from(WHOLE),
    second=st.sampled_from(WHOLE),
    seed=st.integers(0, 1 << 16),
)


def shapes(model: Drawn) -> dict[str, tuple[int, ...]]:
    """The language model's tensors in transformers, written out by hand."""
    hidden, kv = model.heads * model.size, model.heads // model.shared * model.size
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, hidden), "model.norm.weight": (hidden,)}
    for layer in range(model.layers):
        at = f"model.layers.{layer}"
        found |= {f"{at}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{at}.self_attn.o_proj.weight": (hidden, hidden), f"{at}.mlp.down_proj.weight": (hidden, model.mlp)}
        if model.family == "phi3":
            found[f"{at}.self_attn.qkv_proj.weight"] = (hidden + 2 * kv, hidden)
            found[f"{at}.mlp.gate_up_proj.weight"] = (2 * model.mlp, hidden)
            continue
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            found[f"{at}.self_attn.{name}_proj.weight"] = (rows, hidden)
            if model.family == "qwen2":
                found[f"{at}.self_attn.{name}_proj.bias"] = (rows,)
        found |= {f"{at}.mlp.{name}_proj.weight": (model.mlp, hidden) for name in ("gate", "up")}
    return found if model.tied else found | {"lm_head.weight": (ROWS, hidden)}


def write(model: Drawn, template: Path, folder: Path) -> Path:
    """A transformers LLaVA: the template's tower, tokenizer and processor, with another language model."""
    shutil.copytree(template, folder, ignore=shutil.ignore_patterns("conversion.json", "README.md"))
    config = json.loads((folder / "config.json").read_text())
    text: dict[str, Any] = {
        "model_type": model.family,
        "hidden_size": model.heads * model.size,
        "intermediate_size": model.mlp,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.heads // model.shared,
        "vocab_size": ROWS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0 + model.seed,
        "max_position_embeddings": 256,
        "hidden_act": "silu",
        "tie_word_embeddings": model.tied,
        "bos_token_id": config["text_config"]["bos_token_id"],
        "eos_token_id": config["text_config"]["eos_token_id"],
        "torch_dtype": model.dtype,
    }
    text |= {"sliding_window": None} if model.family in ("mistral", "phi3") else {}
    config |= {"text_config": text, "torch_dtype": model.dtype, "tie_word_embeddings": model.tied}
    (folder / "config.json").write_text(json.dumps(config))
    noise, dtype = torch.Generator().manual_seed(model.seed), getattr(torch, model.dtype)

    def noisy(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=noise) / 8).to(dtype)

    state = {f"language_model.{name}": noisy(*shape) for name, shape in shapes(model).items()}
    old = load_file(folder / "model.safetensors")
    state |= {name: noisy(*old[name].shape) for name in old if name.startswith("vision_tower.")}
    wide = old["multi_modal_projector.linear_1.weight"].shape[1]
    hidden = model.heads * model.size
    for number, columns in ((1, wide), (2, hidden)):
        state[f"multi_modal_projector.linear_{number}.weight"] = noisy(hidden, columns)
        state[f"multi_modal_projector.linear_{number}.bias"] = noisy(hidden)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of an output, as others read it."""
    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".gguf":
            for tensor in GGUFReader(path).tensors:
                found[tensor.name] = tensor.tensor_type.name, tuple(tensor.shape.tolist()), tensor.data.tobytes()
            continue
        if path.suffix not in (".safetensors", ".pth"):
            continue
        state = torch.load(path, weights_only=True)["state_dict"] if path.suffix == ".pth" else load_file(path)
        for name, value in state.items():
            data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[f"{path.parent.relative_to(folder)}/{name}"] = str(value.dtype), tuple(value.shape), data
    return found


def small_files(folder: Path) -> Iterator[tuple[str, Any]]:
    """What lies beside the weights, but for names of bases and of the tool's own records."""
    for path in sorted(folder.rglob("*.json")):
        if path.name in ("conversion.json", "model.safetensors.index.json"):
            continue
        yield path.relative_to(folder).as_posix(), _without_names(json.loads(path.read_text()))
    for path in sorted(folder.rglob("*.gguf")):
        fields = GGUFReader(path).fields
        names = [name for name in fields if not name.startswith(("GGUF.", "general.name", "split."))]
        yield path.stem.rpartition("-")[2], {name: fields[name].contents() for name in names}


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_names(inner) for key, inner in value.items() if key not in _NAMES}
    return value


@pytest.fixture(scope="module")
def template(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("template") / "hf"
    llava_convert.convert(tiny / "iter_2.pth", to="hf", prompt_template="llama3_chat", out=out)
    return out


def _convert(source: Path, to: str, out: Path, model: Drawn, bases: dict[str, Path]) -> Path:
    kind = DTYPES[model.dtype][1]
    types: dict[str, Any] = {"outtype": kind, "mmproj_outtype": kind} if to == "gguf" else {"dtype": model.dtype}
    inside = source.parent.name if source.is_file() else source.name
    known: dict[str, Any] = dict(bases) if inside.endswith("pth") else {}
    llava_convert.convert(source, to=to, out=out, name="m", verify="off", **types, **known)
    return out


def _there_and_back(template: Path, model: Drawn) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        source = write(model, template, folder / "source")
        bases = {"llm": folder / "llm", "visual_encoder": folder / "tower"}
        llava_convert.convert(source, to="hf", part="llm", out=bases["llm"], dtype=model.dtype)
        llava_convert.convert(source, to="hf", part="visual-encoder", out=bases["visual_encoder"], dtype=model.dtype)
        one = _convert(source, model.first, folder / f"one-{model.first}", model, bases)
        two = _convert(one, model.second, folder / f"two-{model.second}", model, bases)
        back = _convert(two, model.first, folder / f"back-{model.first}", model, bases)
        lost = NO_ROOM.get(model.second, ())
        before, after = contents(one), contents(back)
        assert before.keys() == after.keys()
        wrong = [name for name in before if before[name] != after[name] and not any(part in name for part in lost)]
        assert wrong == []
        is_mistral = model.family == "mistral"  # which is a Llama in a GGUF
        if model.second == "gguf" or (model.first == "gguf" and is_mistral):
            # The small files are made of metadata, and say the same in other words.
            known = bases if model.first == "pth" else {}
            assert set(llava_convert.verify(one, back, **known).facts) <= (FAMILY_WORDS if is_mistral else set())
            return
        for (name, mine), (_, other) in zip(small_files(one), small_files(back), strict=True):
            assert mine == other, name


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=DRAWN)
def test_there_and_back(template: Path, model: Drawn) -> None:
    _there_and_back(template, model)


FAMILIES = ("llama", "mistral", "qwen2", "phi3")
CELLS = [(one, other) for one in WHOLE for other in WHOLE]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("first", "second"), CELLS)
def test_every_pair_of_layouts_and_every_family(template: Path, family: str, first: str, second: str) -> None:
    dtype = sorted(DTYPES)[(CELLS.index((first, second)) + FAMILIES.index(family)) % len(DTYPES)]
    model = Drawn(family, 4, 2, 8, 2, 32, family == "qwen2", dtype, first, second, 7)
    _there_and_back(template, model)
