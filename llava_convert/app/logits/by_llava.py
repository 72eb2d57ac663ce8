"""A folder of the official layout as the llava package (llava-torch) loads it, with its own functions for text and
pictures (llava/mm_utils.py). Its template is chosen by the user's `--conv-mode`, so the source's text is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_convert.app.ask.runtimes import Answer
from llava_convert.app.logits.loading import folder_of, missing, quiet, reasoned
from llava_convert.app.logits.probes import Probe
from llava_convert.app.logits.shown import FEATURES, PICTURE, PIXELS, PROJECTOR, Shown, greedy, layers
from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.values import dataclass
from llava_convert.model.checkpoint import Checkpoint

OFFICIAL = "official"
_PIP = "pip install --no-deps llava-torch==1.2.2.post1; it wants 'transformers<5', einops and requests beside it"
_CLASSES = {
    "llava": "LlavaLlamaForCausalLM",
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
    "llava_mpt": "LlavaMptForCausalLM",
}


@dataclass(frozen=True)
class ByLlava:
    """Shows all but the template, which its folder does not decide."""

    model: Any
    tokenizer: Any
    images: Any
    name: str = OFFICIAL
    blind: str = "the template, which its --conv-mode chooses"
    answers_only: bool = False

    def show(self, probe: Probe, rendered: str, then: Sequence[int] = ()) -> Shown:
        import torch
        from llava.constants import IMAGE_TOKEN_INDEX
        from llava.mm_utils import process_images, tokenizer_image_token

        model, vision = self.model, {}
        # It adds the BOS itself, as its own templates have none.
        text = rendered.removeprefix(self.tokenizer.bos_token or "")
        ids = tokenizer_image_token(text, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        device = model.device
        with torch.inference_mode():
            pixels = None
            if probe.pictures:
                pixels = torch.stack(list(process_images(probe.pictures, self.images, model.config)))
                pixels = pixels.to(device, torch.float32)
                tower = model.get_vision_tower()
                hidden = tower.vision_tower(pixels, output_hidden_states=True)
                features = tower.feature_select(hidden)
                vision = {
                    PIXELS: pixels,
                    **layers("vision_tower", hidden.hidden_states),
                    FEATURES: features,
                    PROJECTOR: model.get_model().mm_projector(features),
                }
            given = model.prepare_inputs_labels_for_multimodal(ids[None].to(device), None, None, None, None, pixels)
            rows = given[4]
            if rows is None:
                rows = model.get_input_embeddings()(ids[None].to(device))
            made = model(inputs_embeds=rows, output_hidden_states=True, use_cache=False)

            def following(said: list[int]) -> int:
                more = model.get_input_embeddings()(torch.tensor([said], device=device))
                return int(model(inputs_embeds=torch.cat([rows, more], 1), use_cache=False).logits[0, -1].argmax())

            written = greedy(int(made.logits[0, -1].argmax()), _stops(model), following)
        said = self.tokenizer.decode(written, skip_special_tokens=True).strip()
        prompt = tuple(PICTURE if one == IMAGE_TOKEN_INDEX else one for one in ids.tolist())
        return Shown(
            rows.shape[1], made.logits[0].float(), Answer(said, len(written), written[-1] in _stops(model), written),
            prompt, vision, layers("language_model", made.hidden_states),
        )  # fmt: skip


def _stops(model: Any) -> list[int]:
    found = model.generation_config.eos_token_id
    return found if isinstance(found, list) else [] if found is None else [found]


def load(checkpoint: Checkpoint, device: Any, visual_encoder: str | None) -> ByLlava:
    """In float32, where the package's own builder takes float16, so that no rounding hides a difference.

    Raises UsageError without the package, UnsupportedError where it does not load the folder.
    """
    try:
        import llava.model as classes
    except ImportError as problem:
        raise missing("--runtime official", "the llava package", problem, _PIP) from problem
    import torch
    from transformers import AutoConfig, AutoTokenizer

    folder = folder_of(checkpoint)
    with reasoned("llava", "load", folder), quiet():
        config = AutoConfig.from_pretrained(folder)
        kind = _CLASSES.get(config.model_type)
        if kind is None or not hasattr(classes, kind):
            raise UnsupportedError(
                f"the llava package has no class for {config.model_type}", hint="leave --runtime out, or convert to hf"
            )
        tower = visual_encoder or config.mm_vision_tower
        if not Path(tower).exists() and "/" not in tower:
            raise InputError(
                f"the llava package reads the tower from {tower}, which does not exist here",
                hint="give its folder by --visual-encoder",
            )
        config = getattr(classes, kind).config_class.from_pretrained(folder, mm_vision_tower=str(tower))
        model = getattr(classes, kind).from_pretrained(folder, config=config, torch_dtype=torch.float32)
        seen = model.get_vision_tower()
        if not seen.is_loaded:
            seen.load_model()
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
    return ByLlava(model.float().to(device).eval(), tokenizer, seen.image_processor)
