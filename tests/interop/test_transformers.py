"""What this transformers makes of our outputs, against the model assembled by hand from the `.pth`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from tests.interop.by_hand import ByHand, assemble, pieces, read_pth
from tests.interop.conftest import GOLDEN, PROMPT, QUESTION, Converter, Source, gap, padded

NAMES = ("tiny", *GOLDEN)
IMAGE_TOKENS = 16  # (56 / 14)^2
OLD_ROWS = 512
# Measured: 0.0 for every case and dtype.
TOLERANCE = 2e-5
PIXEL_TOLERANCE = 1e-5

Find = Callable[[str], Source]


def load_hf(folder: Path) -> LlavaForConditionalGeneration:
    """Load with every weight found and none left over."""
    model, report = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    left = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert left == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    return model.eval()


def image_ids(model: LlavaForConditionalGeneration, bases: Path) -> torch.Tensor:
    """The prompt as ids, with the features' places filled by the id that the config names."""
    before, after = pieces(bases, PROMPT)
    return torch.tensor([[*before, *[model.config.image_token_index] * IMAGE_TOKENS, *after]])


@torch.inference_mode()
def logits(model: LlavaForConditionalGeneration, hand: ByHand, pixels: torch.Tensor) -> torch.Tensor:
    """Logits of the prompt over the rows that were there before tokens were added."""
    found: torch.Tensor = model(input_ids=image_ids(model, hand.bases), pixel_values=pixels).logits[0]
    return found[:, : hand.llm.config.vocab_size]


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_parts_by_hand(
    converted: Converter, source: Find, pixels: torch.Tensor, name: str, dtype: str
) -> None:
    """With the weights rounded to the output's dtype and all arithmetic in float32."""
    found = source(name)
    hand = assemble(found.pth, found.bases, dtype=getattr(torch, dtype))
    options = {} if dtype == "float16" else {"dtype": dtype}
    model = load_hf(converted(name, "hf", **options))
    assert gap(logits(model, hand, pixels), hand.logits(PROMPT, pixels)) <= TOLERANCE


@pytest.mark.parametrize("name", ["tiny", "a_full_vitlora", "b_llmlora_vitlora"])
def test_the_tolerance_sees_a_lost_adapter(
    converted: Converter, source: Find, pixels: torch.Tensor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.interop.by_hand.LORA_SCALE", 0.0)
    found = source(name)
    hand = assemble(found.pth, found.bases)
    model = load_hf(converted(name, "hf", dtype="float32"))
    assert gap(logits(model, hand, pixels), hand.logits(PROMPT, pixels)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_file_loads_in_its_own_dtype(converted: Converter, name: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        options = {} if dtype == torch.float16 else {"dtype": "bfloat16"}
        model = LlavaForConditionalGeneration.from_pretrained(converted(name, "hf", **options), dtype="auto")
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def _messages(picture: Image.Image) -> list[dict[str, object]]:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("name", NAMES)
def test_processor_writes_the_prompt_that_was_trained(
    converted: Converter, source: Find, tiny: Path, name: str
) -> None:
    """Both ways to a prompt: in one step, and as text which is tokenised afterwards."""
    folder = converted(name, "hf")
    processor = AutoProcessor.from_pretrained(folder)
    model = load_hf(folder)
    picture = Image.open(tiny / "picture.png").convert("RGB")
    in_one = processor.apply_chat_template(
        _messages(picture), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    text = processor.apply_chat_template(_messages(picture), add_generation_prompt=True)
    in_two = processor(text=text, images=picture, return_tensors="pt")
    wanted = image_ids(model, source(name).bases)
    for inputs in (in_one, in_two):
        assert inputs["input_ids"].tolist() == wanted.tolist()
        assert int((inputs["input_ids"] == model.config.image_token_index).sum()) == IMAGE_TOKENS
        assert int((inputs["input_ids"] == model.generation_config.bos_token_id).sum()) == 1
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_index
    assert processor.tokenizer.pad_token_id == model.config.pad_token_id


@pytest.mark.parametrize("name", NAMES)
def test_stop_ids_are_end_of_text_and_end_of_turn(converted: Converter, name: str) -> None:
    folder = converted(name, "hf")
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    stops = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    assert model.generation_config.eos_token_id == stops
    assert model.generation_config.bos_token_id == tokenizer.bos_token_id


def test_trained_model_answers_and_stops(converted: Converter, tiny: Path) -> None:
    """The tiny model was taught a sentence, which it says with its tower's adapter only, and to end its turn."""
    folder = converted("tiny", "hf")
    processor, model = AutoProcessor.from_pretrained(folder), load_hf(folder)
    picture = Image.open(tiny / "picture.png").convert("RGB")
    inputs = processor.apply_chat_template(
        _messages(picture), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(ids) == "a red sun over green hills<|eot_id|>"


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_models_generate_what_the_parts_do(
    converted: Converter, source: Find, pixels: torch.Tensor, name: str
) -> None:
    found = source(name)
    hand = assemble(found.pth, found.bases)
    model = load_hf(converted(name, "hf", dtype="float32"))
    ids = image_ids(model, hand.bases)
    given = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    written = model.generate(**given, do_sample=False, max_new_tokens=4)[0, ids.shape[1] :]
    assert written[0] == hand.logits(PROMPT, pixels)[-1].argmax()
    assert len(written) == 4 or written[-1] in model.generation_config.eos_token_id


@pytest.mark.peers
def test_select_layer_is_carried(converted: Converter, source: Find, pixels: torch.Tensor) -> None:
    """Trained on the tower's last layer; the real converter writes -2 whatever was trained."""
    found = source("visual_select_layer_last")
    model = load_hf(converted("visual_select_layer_last", "hf", dtype="float32"))
    assert model.config.vision_feature_layer == -1
    last, second = (assemble(found.pth, found.bases, select_layer=layer) for layer in (-1, -2))
    ours = logits(model, last, pixels)
    assert gap(ours, last.logits(PROMPT, pixels)) <= TOLERANCE
    assert gap(ours, second.logits(PROMPT, pixels)) > 1e-2


@pytest.mark.peers
@pytest.mark.parametrize(
    "name", ["tied_embeddings", "tied_embeddings_llmlora", "tokens510_rows510", "tokens512_rows576", "base_sharded_bin"]
)
def test_other_bases(converted: Converter, source: Find, pixels: torch.Tensor, name: str) -> None:
    found = source(name)
    model = load_hf(converted(name, "hf", dtype="float32"))
    hand = assemble(found.pth, found.bases)
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows % 64 == 0 and model.config.image_token_index < rows and model.config.pad_token_id < rows
    assert gap(logits(model, hand, pixels), hand.logits(PROMPT, pixels)) <= TOLERANCE


def test_image_processor_llava_pads_where_clip_crops(
    converted: Converter, tiny: Path, wide_picture: Image.Image
) -> None:
    base = CLIPImageProcessor.from_pretrained(tiny / "vit")
    wanted = {"clip": wide_picture, "llava": padded(wide_picture)}
    made = {}
    for kind, picture in wanted.items():
        processor = AutoProcessor.from_pretrained(converted("tiny", "hf", image_processor=kind)).image_processor
        made[kind] = processor(wide_picture, return_tensors="pt")["pixel_values"]
        assert gap(made[kind], base(picture, return_tensors="pt")["pixel_values"]) <= PIXEL_TOLERANCE
    assert gap(made["clip"], made["llava"]) > 1.0


@pytest.mark.parametrize("name", ["tiny", "b_llmlora_vitlora"])
def test_shards(converted: Converter, source: Find, pixels: torch.Tensor, name: str) -> None:
    folder = converted(name, "hf", max_shard_size="100KB", dtype="float32")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    hand = assemble(source(name).pth, source(name).bases)
    assert gap(logits(load_hf(folder), hand, pixels), hand.logits(PROMPT, pixels)) <= TOLERANCE


@pytest.mark.parametrize("name", ["tiny", "a_full_vitlora", "b_llmlora_vitlora", "c_pretrain"])
def test_part_llm_is_a_text_model(converted: Converter, source: Find, name: str) -> None:
    folder = converted(name, "hf", part="llm", dtype="float32")
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(model) is LlamaForCausalLM
    assert not report["missing_keys"] and not report["unexpected_keys"]
    found = source(name)
    hand = assemble(found.pth, found.bases)
    ids = torch.tensor([pieces(hand.bases, "no picture here")[0]])
    with torch.inference_mode():
        assert gap(model(ids).logits, hand.llm(ids).logits) <= TOLERANCE


@pytest.mark.parametrize("name", ["tiny", "a_full_vitlora", "c_pretrain", "d_full_fullvit"])
def test_part_visual_encoder_is_a_clip_tower(
    converted: Converter, source: Find, pixels: torch.Tensor, name: str
) -> None:
    folder = converted(name, "hf", part="visual-encoder", dtype="float32")
    model, report = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert CLIPImageProcessor.from_pretrained(folder).crop_size["height"] == 56
    found = source(name)
    hand = assemble(found.pth, found.bases)
    with torch.inference_mode():
        ours, theirs = (tower(pixel_values=pixels).last_hidden_state for tower in (model, hand.tower))
    assert gap(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_projector_folder_runs_by_its_own_code(
    converted: Converter, source: Find, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    folder = converted(name, "xtuner") / "projector"
    model, report = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert type(model).__name__ == "ProjectorModel" and {p.dtype for p in model.parameters()} == {torch.float32}
    assert not report["missing_keys"] and not report["unexpected_keys"]
    found = source(name)
    hand = assemble(found.pth, found.bases)
    features = torch.randn(1, IMAGE_TOKENS, 32, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        assert gap(model(features), hand.projector(features)) == 0.0


@pytest.mark.parametrize("name", ["tiny", "a_full_vitlora", "b_llmlora_vitlora"])
def test_tower_adapter_merges_by_peft_to_our_tower(converted: Converter, source: Find, name: str) -> None:
    """Under the name that the tower had when xtuner trained: since transformers 5.6 peft finds no module of these."""
    from peft import PeftModel

    base = nn.Module()
    base.vision_model = CLIPVisionModel.from_pretrained(source(name).bases / "vit", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, converted(name, "xtuner") / "visual_encoder_adapter")
    merged = model.merge_and_unload().state_dict()
    ours = load_file(converted(name, "hf", dtype="float32") / "model.safetensors")
    _same_weights(merged, {k.removeprefix("vision_tower."): v for k, v in ours.items() if k.startswith("vision_t")})


@pytest.mark.parametrize("name", ["tiny", "a_full_vitlora", "b_llmlora_vitlora"])
def test_tower_adapter_loads_by_transformers_itself(
    converted: Converter, source: Find, pixels: torch.Tensor, name: str
) -> None:
    found = source(name)
    tower = CLIPVisionModel.from_pretrained(found.bases / "vit", dtype=torch.float32)
    report = tower.load_adapter(converted(name, "xtuner") / "visual_encoder_adapter")
    assert not report.missing_keys and not report.unexpected_keys
    hand = assemble(found.pth, found.bases)
    with torch.inference_mode():
        ours, theirs = (each(pixel_values=pixels).last_hidden_state for each in (tower, hand.tower))
    assert gap(ours, theirs) <= TOLERANCE


def test_llm_adapter_merges_by_peft_to_our_llm(converted: Converter, source: Find) -> None:
    from peft import PeftModel

    name = "b_llmlora_vitlora"
    base = LlamaForCausalLM.from_pretrained(source(name).bases / "llm", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, converted(name, "xtuner", dtype="float32") / "llm_adapter")
    merged = model.merge_and_unload().state_dict()
    ours = load_file(converted(name, "hf", dtype="float32") / "model.safetensors")
    text = {k.removeprefix("language_model."): v for k, v in ours.items() if k.startswith("language_model.")}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        text[key] = text[key][:OLD_ROWS]
    _same_weights(merged, text)


def _same_weights(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> None:
    """Equal but for what peft's float32 rounds otherwise than our one rounding of the exact merge: its last bits.

    Names may lack the `vision_model.` that transformers 5.6 dropped, and buffers are not weights.
    """
    ours = {key.removeprefix("vision_model."): value for key, value in ours.items()}
    theirs = {key.removeprefix("vision_model."): value for key, value in theirs.items()}
    assert ours.keys() == {key for key in theirs if not key.endswith("position_ids")}
    far = [key for key, value in ours.items() if not torch.allclose(value, theirs[key], rtol=1e-6, atol=1e-7)]
    assert far == []


@pytest.mark.parametrize("name", ["tiny", "a_full_vitlora", "b_llmlora_vitlora"])
def test_adapters_hold_what_was_trained(converted: Converter, source: Find, name: str) -> None:
    folder = converted(name, "xtuner", dtype="float32")
    trained = read_pth(source(name).pth)
    for prefix, adapter in (("llm.", "llm_adapter"), ("visual_encoder.", "visual_encoder_adapter")):
        wanted = {k.removeprefix(prefix).replace(".default", ""): v for k, v in trained.items() if k.startswith(prefix)}
        wanted = {k: v for k, v in wanted.items() if ".lora_" in k}
        assert (folder / adapter).is_dir() == bool(wanted)
        if wanted:
            found = load_file(folder / adapter / "adapter_model.safetensors")
            assert found.keys() == wanted.keys()
            assert [k for k, v in found.items() if not torch.equal(v, wanted[k].float())] == []
