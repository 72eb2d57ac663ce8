"""`verify` is a judge: every change of a good output that makes another model of it is a difference, by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import llava_convert
from llava_convert.core.errors import ConvertError, InputError, UnsupportedError
from tests.field.conftest import Models, Tensors, edit, edit_tensors, find

Change = Callable[[Path], object]


@dataclass(frozen=True)
class Mutant:
    """A change of one layout's output; `named` stands in what `verify` says, or refuses to read it for."""

    layout: str
    name: str
    change: Change
    named: str

    def __str__(self) -> str:
        return f"{self.layout}: {self.name}"


def keys(layout: str, file: str, named: str, **values: Any) -> Mutant:
    told = ", ".join(f"{key} = {value}" for key, value in values.items())
    return Mutant(layout, f"{file}: {told}", lambda folder: edit(folder, file, **values), named)


def without(layout: str, file: str, named: str) -> Mutant:
    return Mutant(layout, f"no {file}", lambda folder: (folder / file).unlink(), named)


def tensors(
    layout: str, name: str, change: Callable[[Tensors], Tensors | None], named: str | None, file: str = ""
) -> Mutant:
    return Mutant(layout, name, lambda folder: edit_tensors(folder, change, file or "model.safetensors"), named)


def at(*parts: str, **change: Any) -> Callable[[Tensors], None]:
    """Set one element of the tensor whose name holds the parts: by `add`, or to `value`."""

    def apply(found: Tensors) -> None:
        array = found[find(found, *parts)]
        flat = array.reshape(-1)
        index = change.get("index", -1)
        flat[index] = change["value"] if "value" in change else flat[index] + change["add"]

    return apply


def bit(*parts: str) -> Callable[[Tensors], None]:
    def apply(found: Tensors) -> None:
        array = found[find(found, *parts)]
        array.view(f"u{array.itemsize}").reshape(-1)[0] ^= 1

    return apply


def swapped(one: tuple[str, ...], other: tuple[str, ...]) -> Callable[[Tensors], None]:
    def apply(found: Tensors) -> None:
        a, b = find(found, *one), find(found, *other)
        found[a], found[b] = found[b], found[a]

    return apply


def noisy_row(found: Tensors) -> None:
    array = found[find(found, "embed_tokens")]
    array[-1] = np.linspace(-1, 1, array.shape[1])


def more_rows(*parts: str) -> Callable[[Tensors], None]:
    def apply(found: Tensors) -> None:
        name = find(found, *parts)
        found[name] = np.concatenate([found[name], found[name][:2]])

    return apply


def json_at(file: str, change: Callable[[Any], object]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def tokenizer(name: str, named: str, change: Callable[[Any], object]) -> Mutant:
    return Mutant("hf", name, json_at("tokenizer.json", change), named)


def exchange_tokens(content: Any) -> None:
    vocab = content["model"]["vocab"]
    one, other = sorted(vocab, key=vocab.get)[300:302]
    vocab[one], vocab[other] = vocab[other], vocab[one]


def template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    edit(folder, "tokenizer_config.json", chat_template="{{ messages[0].content }}")


def untied(folder: Path) -> None:
    edit(folder, tie_word_embeddings=True, text_config__tie_word_embeddings=True)


ADAPTER = "visual_encoder_adapter/adapter_config.json"
ADAPTER_WEIGHTS = "visual_encoder_adapter/adapter_model.safetensors"
TEXT, EYES = "text_config__", "vision_config__"

JSON_MUTANTS = [
    # the language model's numbers
    *(
        keys("hf", "config.json", key, **{f"{TEXT}{key}": value})
        for key, value in {
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "linear", "factor": 4.0, "rope_type": "linear"},
            "rms_norm_eps": 1e-3,
            "hidden_act": "gelu",
            "max_position_embeddings": 77,
            "bos_token_id": 7,
            "eos_token_id": 7,
            "partial_rotary_factor": 0.5,
        }.items()
    ),
    keys("hf", "config.json", "num_key_value_heads", **{f"{TEXT}num_key_value_heads": 4}),
    keys("hf", "config.json", "num_hidden_layers", **{f"{TEXT}num_hidden_layers": 1}),
    keys("hf", "config.json", "attention_bias", **{f"{TEXT}attention_bias": True}),
    keys("hf", "config.json", "vocab_size", **{f"{TEXT}vocab_size": 512}),
    keys("hf", "config.json", "model_type", **{f"{TEXT}model_type": "mistral"}),
    # the tower's
    keys("hf", "config.json", "layer_norm_eps", **{f"{EYES}layer_norm_eps": 0.1}),
    keys("hf", "config.json", "num_attention_heads", **{f"{EYES}num_attention_heads": 8}),
    keys("hf", "config.json", "hidden_act", **{f"{EYES}hidden_act": "gelu"}),
    keys("hf", "config.json", "image_size", **{f"{EYES}image_size": 28}),
    # what joins them
    keys("hf", "config.json", "projector.activation", projector_hidden_act="relu"),
    keys("hf", "config.json", "projector.bias", multimodal_projector_bias=False),
    keys("hf", "config.json", "vision.feature_layer", vision_feature_layer=-1),
    keys("hf", "config.json", "vision.feature_strategy", vision_feature_select_strategy="full"),
    keys("hf", "config.json", "image_token_index", image_token_index=5),
    keys("hf", "config.json", "architectures", architectures=["LlavaNextForConditionalGeneration"]),
    keys("hf", "config.json", "prompt.max_length", tokenizer_model_max_length=99),
    keys("hf", "config.json", "strange", strange=1),
    # stops
    keys("hf", "generation_config.json", "eos_token_id", eos_token_id=[444]),
    keys("hf", "generation_config.json", "stop_strings", stop_strings=["x"]),
    keys("hf", "generation_config.json", "suppress_tokens", suppress_tokens=[3]),
    without("hf", "generation_config.json", "eos_token_id"),
    # the tokenizer
    tokenizer("two tokens exchanged", "tokenizer: tokens", exchange_tokens),
    tokenizer("a merge is gone", "merges", lambda c: c["model"]["merges"].pop(3)),
    tokenizer("no normalizer but one", "normalizer", lambda c: c.update(normalizer={"type": "NFC"})),
    tokenizer("another pre-tokenizer", "pre_tokenizer", lambda c: c.update(pre_tokenizer={"type": "Whitespace"})),
    tokenizer("no post-processor", "post_processor", lambda c: c.update(post_processor=None)),
    tokenizer("an added token is not special", "added token", lambda c: c["added_tokens"][0].update(special=False)),
    keys("hf", "tokenizer_config.json", "eos token", eos_token="<|begin_of_text|>"),
    keys("hf", "tokenizer_config.json", "BOS", add_bos_token=False),
    without("hf", "tokenizer.json", "tokenizer"),
    Mutant("hf", "another chat template", template, "chat template"),
    # pictures
    keys("hf", "preprocessor_config.json", "image_mean", image_mean=[0, 0, 0]),
    keys("hf", "preprocessor_config.json", "image_std", image_std=[1, 1, 1]),
    keys("hf", "preprocessor_config.json", "rescale_factor", rescale_factor=1.0),
    keys("hf", "preprocessor_config.json", "do_normalize", do_normalize=False),
    keys("hf", "preprocessor_config.json", "resample", resample=0),
    keys("hf", "preprocessor_config.json", "size", size={"shortest_edge": 28}),
    keys("hf", "processor_config.json", "patch_size", patch_size=7),
    keys("hf", "processor_config.json", "num_additional_image_tokens", num_additional_image_tokens=0),
    keys("hf", "processor_config.json", "vision_feature_select_strategy", vision_feature_select_strategy="full"),
    # official
    keys("official", "config.json", "mm_projector_type", mm_projector_type="linear"),
    keys("official", "config.json", "mm_hidden_size", mm_hidden_size=64),
    keys("official", "config.json", "rope_theta", rope_theta=10000.0),
    keys("official", "config.json", "rms_norm_eps", rms_norm_eps=0.1),
    keys("official", "config.json", "picture.aspect_ratio", image_aspect_ratio="anyres"),
    keys("official", "config.json", "picture.aspect_ratio", image_aspect_ratio="square"),
    keys("official", "config.json", "prompt.start_and_end", mm_use_im_start_end=True),
    keys("official", "config.json", "vision.resampler", mm_resampler_type="qformer"),
    keys("official", "config.json", "vision.scales", s2=True),
    keys("official", "config.json", "vocab_size", vocab_size=513),
    keys("official", "config.json", "use_mm_proj", use_mm_proj=False),
    keys("official", "config.json", "unfreeze_mm_vision_tower", unfreeze_mm_vision_tower=False),
    keys("official", "config.json", "vision.feature_layer", mm_vision_select_layer=-1),
    keys("official", "config.json", "vision.feature_strategy", mm_vision_select_feature="cls_patch"),
    Mutant("official", "another chat template", template, "chat template"),
    # xtuner
    keys("xtuner", ADAPTER, "alpha / r", lora_alpha=999),
    keys("xtuner", ADAPTER, "alpha / r", use_rslora=True),
    keys("xtuner", ADAPTER, "DoRA", use_dora=True),
    keys("xtuner", ADAPTER, "r", r=3),
    keys("xtuner", "projector/config.json", "projector.depth", depth=1),
    keys("xtuner", "projector/config.json", "projector.activation", hidden_act="relu"),
    keys("xtuner", "projector/config.json", "projector.bias", bias=False),
    keys("xtuner", "projector/config.json", "visual_hidden_size", visual_hidden_size=5),
    keys("xtuner", "config.json", "rope_theta", rope_theta=1.0),
]
TENSOR_MUTANTS = [
    tensors("hf", "one bit of the projector", bit("multi_modal_projector", "linear_2.weight"), "projector.2.weight"),
    tensors("hf", "one bit of the tower", bit("vision_tower", "layers.0.mlp.fc1.weight"), "mlp.fc1.weight"),
    tensors("hf", "one bit of a norm", bit("language_model", "layers.0.input_layernorm.weight"), "input_layernorm"),
    tensors(
        "hf",
        "two layers exchanged",
        swapped(("language_model", "layers.0.mlp.up_proj"), ("language_model", "layers.1.mlp.up_proj")),
        "mlp.up_proj",
    ),
    tensors("hf", "NaN in an added row", at("embed_tokens", value=np.nan), "embed_tokens"),
    tensors("hf", "noise in an added row", noisy_row, "embed_tokens"),
    tensors("hf", "rows behind those of k", more_rows("language_model", "layers.0.self_attn.k_proj"), "k_proj"),
    tensors("hf", "rows behind the tower's positions", more_rows("position_embedding"), "position_embedding"),
    tensors("hf", "rows behind the vocabulary's", more_rows("embed_tokens"), "vocab_size"),
    tensors(
        "hf", "a bias is gone", lambda t: {n: a for n, a in t.items() if "linear_1.bias" not in n}, "projector.0.bias"
    ),
    tensors("xtuner", "one bit of the LoRA", bit("lora_A"), "lora_A", ADAPTER_WEIGHTS),
    Mutant("hf", "it says tied, and the head differs", untied, "tie_word_embeddings"),
]


@pytest.mark.parametrize("mutant", [*JSON_MUTANTS, *TENSOR_MUTANTS], ids=str)
def test_a_change_is_a_difference(models: Models, tmp_path: Path, mutant: Mutant) -> None:
    changed = models.copy(mutant.layout, tmp_path / "changed")
    mutant.change(changed)
    try:
        verdict = llava_convert.verify(models.pth, changed)
    except (InputError, UnsupportedError) as refused:
        assert mutant.named.rpartition(".")[2] in str(refused), refused
        return
    assert not verdict.same
    said = {*verdict.facts, *verdict.different, *verdict.missing, *verdict.extra}
    assert any(mutant.named in name for name in said), said
    with pytest.raises(ConvertError) as refused:
        verdict.refuse()
    assert refused.value.exit_code == 7
    json.dumps(verdict.as_json())


def entry(key: str, value: Any) -> Callable[[gguf.GGUFReader], None]:
    def change(reader: gguf.GGUFReader) -> None:
        field = reader.fields[key]
        for index in field.data:
            field.parts[index][0] = value

    return change


def strings_exchanged(key: str, start: int) -> Callable[[gguf.GGUFReader], None]:
    """Two entries of one length, so that the file keeps its size."""

    def change(reader: gguf.GGUFReader) -> None:
        field = reader.fields[key]
        first = field.parts[field.data[start]]
        places = (field.parts[i] for i in field.data[start + 1 :])
        other = next(p for p in places if len(p) == len(first) and bytes(p) != bytes(first))
        kept = first.copy()
        first[:], other[:] = other.copy(), kept

    return change


def damaged(key: str) -> Callable[[gguf.GGUFReader], None]:
    def change(reader: gguf.GGUFReader) -> None:
        field = reader.fields[key]
        field.parts[field.data[0]][:5] = ord("x")

    return change


def flipped(tensor: str) -> Callable[[gguf.GGUFReader], None]:
    def change(reader: gguf.GGUFReader) -> None:
        data = next(t for t in reader.tensors if t.name == tensor).data
        data.reshape(-1).view(np.uint8)[-1] ^= 1

    return change


GGUF_MUTANTS = [
    *(
        ("good-f16.gguf", entry(key, value), key)
        for key, value in {
            "llama.attention.head_count": 2,
            "llama.attention.head_count_kv": 1,
            "llama.attention.layer_norm_rms_epsilon": 0.5,
            "llama.rope.freq_base": 10000.0,
            "llama.rope.dimension_count": 8,
            "llama.block_count": 1,
            "llama.context_length": 9,
            "llama.embedding_length": 32,
            "llama.feed_forward_length": 64,
            "tokenizer.ggml.bos_token_id": 5,
        }.items()
    ),
    ("good-f16.gguf", entry("tokenizer.ggml.eos_token_id", 5), "stop ids"),
    ("good-f16.gguf", strings_exchanged("tokenizer.ggml.tokens", 200), "tokenizer.ggml.tokens"),
    ("good-f16.gguf", strings_exchanged("tokenizer.ggml.merges", 20), "tokenizer.ggml.merges"),
    ("good-f16.gguf", entry("tokenizer.ggml.token_type", 1), "tokenizer.ggml.token_type"),
    ("good-f16.gguf", damaged("tokenizer.chat_template"), "tokenizer.chat_template"),
    ("good-f16.gguf", damaged("tokenizer.ggml.pre"), "tokenizer.ggml.pre"),
    ("good-f16.gguf", flipped("blk.0.attn_q.weight"), "q_proj"),
    ("good-q8_0.gguf", flipped("blk.0.attn_q.weight"), "q_proj"),
    *(
        ("good-mmproj-f16.gguf", entry(key, value), key)
        for key, value in {
            "clip.vision.image_mean": 9.0,
            "clip.vision.image_std": 9.0,
            "clip.vision.image_size": 28,
            "clip.vision.patch_size": 7,
            "clip.vision.embedding_length": 16,
            "clip.vision.attention.head_count": 2,
            "clip.vision.attention.layer_norm_epsilon": 0.5,
            "clip.vision.projection_dim": 32,
            "clip.use_gelu": True,
        }.items()
    ),
    ("good-mmproj-f16.gguf", entry("clip.vision.feature_layer", 1), "vision.feature_layer"),
]


@pytest.mark.parametrize(("file", "change", "named"), GGUF_MUTANTS, ids=[f"{m[0]}: {m[2]}" for m in GGUF_MUTANTS])
def test_a_change_of_a_gguf_is_a_difference(
    models: Models, tmp_path: Path, file: str, change: Callable[[gguf.GGUFReader], None], named: str
) -> None:
    changed = models.copy("gguf", tmp_path / "changed")
    reader = gguf.GGUFReader(changed / file, "r+")
    change(reader)
    reader.data.flush()
    try:
        verdict = llava_convert.verify(models.pth, changed)
    except (InputError, UnsupportedError):
        return  # no model at all: a size that its tensors contradict
    assert not verdict.same
    assert any(named in name for name in (*verdict.facts, *verdict.different)), verdict


@pytest.mark.parametrize(
    ("layout", "file", "values", "reason"),
    [
        ("hf", "config.json", {"torch_dtype": "bfloat16"}, None),
        ("hf", "config.json", {"image_seq_length": 576}, "image_seq_length"),
        ("hf", "config.json", {"text_config__initializer_range": 0.5}, "initializer_range"),
        ("hf", "generation_config.json", {"temperature": 0.3}, "temperature"),
        ("hf", "tokenizer_config.json", {"padding_side": "right"}, "padding_side"),
        ("official", "config.json", {"mm_vision_tower": "openai/clip-vit-base-patch16"}, None),
        ("official", "config.json", {"tune_mm_mlp_adapter": True}, None),
        ("xtuner", ADAPTER, {"lora_dropout": 0.5, "base_model_name_or_path": "other/name"}, None),
    ],
)
def test_what_decides_nothing_is_named_as_that(
    models: Models, tmp_path: Path, layout: str, file: str, values: dict[str, Any], reason: str | None
) -> None:
    changed = edit(models.copy(layout, tmp_path / "changed"), file, **values)
    verdict = llava_convert.verify(models.pth, changed)
    assert verdict.same, verdict
    assert reason is None or any(reason in name for name in verdict.harmless)


def test_no_card_and_another_file_type_decide_nothing(models: Models, tmp_path: Path) -> None:
    changed = models.copy("gguf", tmp_path / "changed")
    (changed / "README.md").unlink()
    reader = gguf.GGUFReader(changed / "good-f16.gguf", "r+")
    entry("general.file_type", 2)(reader)
    reader.data.flush()
    assert llava_convert.verify(models.pth, changed)


@pytest.mark.parametrize("part", ["projector", "visual-encoder", "garbage", 5, []])
def test_the_record_is_no_witness(models: Models, tmp_path: Path, part: Any) -> None:
    """What it says of the part excuses nothing that the files hold."""
    changed = models.copy("hf", tmp_path / "changed")
    edit(changed, "conversion.json", options__part=part)
    assert llava_convert.verify(models.pth, changed)
    edit_tensors(changed, bit("language_model", "layers.0.self_attn.q_proj.weight"))
    assert not llava_convert.verify(models.pth, changed)


def test_rows_that_no_record_tells_of_are_counted(models: Models, tmp_path: Path) -> None:
    changed = models.copy("hf", tmp_path / "changed")
    assert llava_convert.verify(models.pth, changed).unrecorded_rows == {}
    (changed / "conversion.json").unlink()
    edit_tensors(changed, noisy_row)
    verdict = llava_convert.verify(models.pth, changed)
    assert verdict.same and set(verdict.unrecorded_rows.values()) == {64}
    assert "64 unrecorded rows" in verdict.sentence()
    edit_tensors(changed, at("embed_tokens", value=np.inf))
    assert not llava_convert.verify(models.pth, changed)


def test_rows_that_the_record_tells_of_are_there(models: Models, tmp_path: Path) -> None:
    changed = models.copy("hf", tmp_path / "changed")
    edit_tensors(changed, lambda t: {n: a[:512] if a.shape[0] == 576 else a for n, a in t.items()})
    with pytest.raises(InputError, match="disagree"):
        llava_convert.convert(changed, to="official", out=tmp_path / "out")
    assert not llava_convert.verify(models.pth, changed)


@pytest.fixture(scope="module")
def tied(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head is its embedding."""
    folder = tmp_path_factory.mktemp("tied")
    shutil.copytree(tiny / "llm", folder / "llm")
    edit(folder / "llm", tie_word_embeddings=True)
    file = folder / "llm" / "model.safetensors"
    whole = load_file(file)
    save_file({name: tensor.half() for name, tensor in whole.items() if "lm_head" not in name}, file, {"format": "pt"})
    llava_convert.convert(folder / "llm", to="gguf", part="llm", out=folder / "gguf")
    llava_convert.convert(folder / "gguf", to="hf", part="llm", out=folder / "hf")
    return folder


def test_a_head_of_its_own_where_the_source_has_none(tied: Path, tmp_path: Path) -> None:
    assert llava_convert.verify(tied / "gguf", tied / "hf")
    shutil.copytree(tied / "hf", tmp_path / "same")
    embedding = "model.embed_tokens.weight"
    edit_tensors(tmp_path / "same", lambda t: {**t, "lm_head.weight": t[embedding]})
    assert llava_convert.verify(tied / "gguf", tmp_path / "same")  # written out, it says nothing new
    edit_tensors(tmp_path / "same", lambda t: {**t, "lm_head.weight": t[embedding] * 2})
    verdict = llava_convert.verify(tied / "gguf", tmp_path / "same")
    assert list(verdict.different) == ["language_model.lm_head.weight"]
