"""A model of any layout as this package puts it into memory: transformers' classes of its two halves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava_convert.app.ask.transformers_runtime import TransformersRuntime
from llava_convert.app.logits.probes import Probe
from llava_convert.app.logits.shown import ANSWER, FEATURES, OURS, PIXELS, PROJECTOR, Shown, joined, layers
from llava_convert.core.values import dataclass


@dataclass(frozen=True)
class ByParts:
    """Shows all there is."""

    runtime: TransformersRuntime
    name: str = OURS
    blind: str = ""
    answers_only: bool = False

    def show(self, probe: Probe, rendered: str, then: Sequence[int] = ()) -> Shown:
        import torch

        runtime, vision, rows = self.runtime, {}, []
        with torch.inference_mode():
            chunks = runtime.words.chunks(probe.messages)
            for picture in probe.pictures:
                vision = self._vision(picture)
                rows.append(vision[PROJECTOR])
            asked = [*chunks[:-1], [*chunks[-1], *then]]
            made = runtime.llm(inputs_embeds=runtime.embedded(asked, rows), output_hidden_states=True, use_cache=False)
        answer = runtime.answer(probe.messages, probe.pictures, limit=ANSWER)
        return Shown(
            made.logits.shape[1] - len(then), made.logits[0].float(), answer, joined(chunks), vision,
            layers("language_model", made.hidden_states),
        )  # fmt: skip

    def _vision(self, picture: Any) -> dict[str, Any]:
        """What comes of a picture, site by site, the rows for the language model last."""
        runtime = self.runtime
        pixels = runtime.pixels(picture)
        hidden = runtime.hidden(pixels)
        features = runtime.selected(hidden)
        # What lies behind the layer that is read decides nothing, and some layouts leave it out.
        read = range(len(hidden))[runtime.layer] + 1
        return {
            PIXELS: pixels,
            **layers("vision_tower", hidden[:read]),
            FEATURES: features,
            PROJECTOR: runtime.projector(features),
        }
