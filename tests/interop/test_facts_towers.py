"""What a SigLIP hands on, by the code base that trained it; and how a picture becomes pixels, through every layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import AutoImageProcessor, LlavaConfig, LlavaForConditionalGeneration

import llava_convert
from tests.interop.conftest import Converter, gap
from tests.interop.fact_models import TOKENS, Made, config_of, fill, ids_of, logits, write

TOLERANCE = 1e-5  # measured: 0.0
KEPT = 2  # blocks of three
SIGLIP = "google/siglip-so400m-patch14-384"
CFG = """\
llm_name_or_path = '{llm}'
visual_encoder_name_or_path = '{eyes}'
prompt_template = 'xtuner.utils.PROMPT_TEMPLATE.llama3_chat'
model = dict(
    freeze_llm=False,
    freeze_visual_encoder=False,
    llm=dict(
        pretrained_model_name_or_path='{llm}',
        trust_remote_code=True,
        type='transformers.AutoModelForCausalLM.from_pretrained'),
    type='xtuner.model.LLaVAModel',
    visual_encoder=dict(
        pretrained_model_name_or_path='{eyes}',
        type='transformers.SiglipVisionModel.from_pretrained'))
"""


@dataclass(frozen=True)
class Parts:
    """The parts of one model, and folders of them: a SigLIP of three blocks, a language model."""

    model: Any
    config: dict[str, Any]
    siglip: Path
    llm: Path

    def state(self, language: str, projector: str, tower: str) -> dict[str, torch.Tensor]:
        """All weights, under the names of a layout in front."""
        inner = self.model.model
        found = {f"{language}model.{key}": value for key, value in inner.language_model.state_dict().items()}
        found[f"{language}lm_head.weight"] = self.model.lm_head.weight.data
        for mine, theirs in (("linear_1", "0"), ("linear_2", "2")):
            layer = getattr(inner.multi_modal_projector, mine)
            found |= {f"{projector}{theirs}.{key}": value for key, value in layer.state_dict().items()}
        return found | {tower + key: value for key, value in tower_state(inner.vision_tower).items()}

    @torch.inference_mode()
    def logits(self, pixels: torch.Tensor, *, first: int) -> torch.Tensor:
        """By hand: the output of the last kept block from feature `first` on, the projector, the language model."""
        inner = self.model.model
        outputs: list[torch.Tensor] = []
        blocks = next(m for m in inner.vision_tower.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
        hook = blocks[KEPT - 1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
        inner.vision_tower(pixel_values=pixels)
        hook.remove()
        seen = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
        one, two = inner.multi_modal_projector.linear_1, inner.multi_modal_projector.linear_2
        rows = two(nn.functional.gelu(one(seen[:, first:])))[0]
        words = ids_of(self.model.config, 48, len(rows))[0]
        embed = inner.language_model.get_input_embeddings()
        mixed = torch.cat([embed(words[:1]), rows, embed(words[1 + len(rows) :])])
        hidden = inner.language_model(inputs_embeds=mixed[None]).last_hidden_state
        found: torch.Tensor = self.model.lm_head(hidden)[0, :, :TOKENS]
        return found


def tower_state(tower: nn.Module) -> dict[str, torch.Tensor]:
    """Under the names of every release."""
    return {f"vision_model.{key.removeprefix('vision_model.')}": v for key, v in tower.state_dict().items()}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, converted: Converter) -> Parts:
    folder = tmp_path_factory.mktemp("siglip")
    config = config_of(Made(tower="siglip", top={"vision_feature_select_strategy": "full"}))
    model = LlavaForConditionalGeneration(LlavaConfig.from_dict(json.loads(json.dumps(config))))
    fill(model)
    half = [0.5, 0.5, 0.5]
    _folder(
        folder / "siglip",
        tower_state(model.model.vision_tower),
        {"architectures": ["SiglipVisionModel"], **config["vision_config"]},
    )
    processor = {"image_processor_type": "SiglipImageProcessor", "image_mean": half, "image_std": half}
    size = {"height": 56, "width": 56}
    (folder / "siglip" / "preprocessor_config.json").write_text(json.dumps({**processor, "size": size}))
    language = {k: v for k, v in Parts(model, config, folder, folder).state("", "p.", "v.").items() if k[1] != "."}
    _folder(folder / "llm", language, config["text_config"])
    for file in converted("tiny", "official").iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "generation_config", "chat_template")):
            (folder / "llm" / file.name).write_bytes(file.read_bytes())
    return Parts(model.eval(), config, folder / "siglip", folder / "llm")


def _folder(folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def test_siglip_of_llava_next(parts: Parts, pixels: torch.Tensor, tmp_path: Path) -> None:
    """LLaVA-NeXT's SigLIP is saved without its last block and head, and every feature of what is left goes on, whatever
    mm_vision_select_feature says (siglip_encoder.py)."""
    state = parts.state("", "model.mm_projector.", "model.vision_tower.vision_tower.")
    kept = {k: v for k, v in state.items() if f".layers.{KEPT}." not in k.partition("vision_model.")[2]}
    kept = {k: v for k, v in kept.items() if ".vision_model.head." not in k}
    assert len(state) > len(kept)
    own = {
        "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
        "mm_vision_tower": SIGLIP, "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "image_aspect_ratio": "pad", "use_mm_proj": True,
    }  # fmt: skip
    _folder(tmp_path / "next", kept, {**parts.config["text_config"], **own})
    for file in parts.llm.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "config.json":
            (tmp_path / "next" / file.name).write_bytes(file.read_bytes())
    out = tmp_path / "hf"
    llava_convert.convert(tmp_path / "next", to="hf", out=out, dtype="float32", visual_encoder=str(parts.siglip))
    said = json.loads((out / "config.json").read_text())
    assert said["vision_feature_select_strategy"] == "full"
    assert gap(logits(out, pixels), parts.logits(pixels, first=0)) <= TOLERANCE
    assert gap(parts.logits(pixels, first=1)[-8:], parts.logits(pixels, first=0)[-8:]) > 0.05


def test_siglip_of_xtuner(parts: Parts, pixels: torch.Tensor, tmp_path: Path) -> None:
    """xtuner 0.1.23 leaves the first feature out of whatever tower (model/llava.py: `[:, 1:]`), and so trains."""
    meta = {"cfg": CFG.format(llm=parts.llm, eyes=parts.siglip), "epoch": 0, "iter": 2}
    state = {k: v.clone() for k, v in parts.state("llm.", "projector.model.", "visual_encoder.").items()}
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "iter_2.pth")
    out = tmp_path / "hf"
    llava_convert.convert(tmp_path / "iter_2.pth", to="hf", out=out, dtype="float32")
    assert json.loads((out / "config.json").read_text())["vision_feature_select_strategy"] == "default"
    assert gap(logits(out, pixels, features=15), parts.logits(pixels, first=1)) <= TOLERANCE


@pytest.mark.parametrize("to", ["hf", "xtuner", "official", "gguf"])
def test_pixels_through_a_layout(converted: Converter, wide_picture: Image.Image, tmp_path: Path, to: str) -> None:
    """Mean and deviation that are not CLIP's."""
    source = write(tmp_path / "source", converted("tiny", "hf"), Made())
    file = source / "preprocessor_config.json"
    said = json.loads(file.read_text())
    usual = _pixels(source, wide_picture)
    file.write_text(json.dumps({**said, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.75, 0.25]}))
    wanted = _pixels(source, wide_picture)
    assert float((wanted - usual).abs().max()) > 0.5
    more = {"outtype": "f32", "mmproj_outtype": "f32"} if to == "gguf" else {"dtype": "float32"}
    out = converted.onward(source, to, **more)
    back = out if to == "hf" else converted.onward(out, "hf")
    assert float((_pixels(back, wide_picture) - wanted).abs().max()) <= 1e-6


def _pixels(folder: Path, picture: Image.Image) -> torch.Tensor:
    found: torch.Tensor = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    return found
