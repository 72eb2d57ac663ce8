"""A folder of the hf layout as transformers' own class and processor load it, and as a user of these calls them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llava_convert.app.ask.runtimes import TRANSFORMERS, Answer
from llava_convert.app.logits.loading import folder_of, quiet, reasoned
from llava_convert.app.logits.probes import Probe
from llava_convert.app.logits.shown import ANSWER, FEATURES, PICTURE, PIXELS, PROJECTOR, Shown, layers
from llava_convert.core.values import dataclass
from llava_convert.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class ByTransformers:
    """Shows all there is."""

    model: Any
    processor: Any
    name: str = TRANSFORMERS
    blind: str = ""
    answers_only: bool = False

    def show(self, probe: Probe, rendered: str, then: Sequence[int] = ()) -> Shown:
        import torch

        vision: dict[str, Any] = {}
        made = self.processor.apply_chat_template(
            [{"role": "user", "content": _content(probe)}], add_generation_prompt=True
        )
        # As its apply_chat_template does with tokenize=True: a template may write the BOS itself.
        bos = self.processor.tokenizer.bos_token
        given = self.processor(
            text=made, images=probe.pictures or None, return_tensors="pt",
            add_special_tokens=not (bos and made.startswith(bos)),
        ).to(self.model.device)  # fmt: skip
        ids, token = given["input_ids"][0].tolist(), self.model.config.image_token_id
        with torch.inference_mode(), _watched(self.model, vision):
            found = self.model(**given, output_hidden_states=True, use_cache=False)
        with torch.inference_mode(), quiet():
            written = self.model.generate(**given, do_sample=False, max_new_tokens=ANSWER)[0, len(ids) :].tolist()
        said = self.processor.tokenizer.decode(written, skip_special_tokens=True).strip()
        if "pixel_values" in given:
            vision[PIXELS] = given["pixel_values"]
        prompt = [
            PICTURE if one == token else one for i, one in enumerate(ids) if not (i and one == token == ids[i - 1])
        ]
        return Shown(
            len(ids), found.logits[0].float(), Answer(said, len(written), len(written) < ANSWER, tuple(written)),
            tuple(prompt), vision, layers("language_model", found.hidden_states),
        )  # fmt: skip


def _content(probe: Probe) -> list[dict[str, str]]:
    text = probe.messages[0]["content"].rpartition("\n")[2]
    return [*({"type": "image"} for _ in probe.pictures), {"type": "text", "text": text}]


@contextmanager
def _watched(model: Any, found: dict[str, Any]) -> Iterator[None]:
    """Keep what goes through tower and projector in `found`."""

    def tower(_: Any, given: Any, made: Any) -> None:
        if (hidden := getattr(made, "hidden_states", None)) is not None:
            found.update(layers("vision_tower", hidden))

    def projector(_: Any, given: Any, made: Any) -> None:
        found[FEATURES], found[PROJECTOR] = given[0], made

    kinds = {"vision_tower": tower, "multi_modal_projector": projector}
    hooks = [
        module.register_forward_hook(kinds[last])
        for name, module in model.named_modules()
        if (last := name.rpartition(".")[2]) in kinds
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def load(checkpoint: Checkpoint, device: Any, visual_encoder: str | None) -> ByTransformers:
    """Raises UnsupportedError (exit 4) where transformers does not load it."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = folder_of(checkpoint)
    with reasoned(TRANSFORMERS, "load", folder), quiet():
        model = LlavaForConditionalGeneration.from_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)
    return ByTransformers(model.float().to(device).eval(), processor)
