"""A folder of the hf layout as mlx-vlm loads it: on Apple's GPUs, or, with `mlx[cpu]`, on the CPU of any Linux."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava_convert.app.ask.runtimes import Answer
from llava_convert.app.logits.loading import folder_of, missing, reasoned
from llava_convert.app.logits.probes import Probe
from llava_convert.app.logits.shown import (
    EMBEDDINGS,
    FEATURES,
    PICTURE,
    PIXELS,
    PROJECTOR,
    Shown,
    greedy,
    layers,
)
from llava_convert.core.values import dataclass
from llava_convert.model.checkpoint import Checkpoint

MLX = "mlx"


@dataclass(frozen=True)
class ByMlx:
    """Shows all but the layers of the language model."""

    model: Any
    processor: Any
    stops: tuple[int, ...]
    name: str = MLX
    blind: str = "the layers of the language model"
    answers_only: bool = False

    def show(self, probe: Probe, rendered: str, then: Sequence[int] = ()) -> Shown:
        import mlx.core as mx
        from mlx_vlm.prompt_utils import apply_chat_template

        model, config = self.model, self.model.config
        text = probe.messages[0]["content"].rpartition("\n")[2]
        prompt = apply_chat_template(self.processor, config, text, num_images=len(probe.pictures))
        # Its prepare_inputs hands `padding` to image processors, and those of transformers 5.24 refuse it. The BOS is
        # the tokenizer's to add, once.
        given = self.processor(
            images=probe.pictures or None, text=prompt.removeprefix(self.processor.tokenizer.bos_token or "")
        )
        ids, pixels = mx.array(given["input_ids"]), given.get("pixel_values")
        vision: dict[str, Any] = {}
        if pixels is not None:
            pixels = mx.array(pixels)
            *_, hidden = model.vision_tower(pixels.transpose(0, 2, 3, 1), output_hidden_states=True)
            features = hidden[config.vision_feature_layer]
            if config.vision_feature_select_strategy == "default":
                features = features[:, 1:]
            vision = {
                PIXELS: pixels,
                **layers("vision_tower", hidden),
                FEATURES: features,
                PROJECTOR: model.multi_modal_projector(features),
            }
        rows = model.get_input_embeddings(ids, pixels).inputs_embeds
        embed = model.language_model.model.embed_tokens

        def logits(said: Sequence[int] = ()) -> Any:
            every, embeds = ids, rows
            if said:
                more = mx.array([list(said)])
                every, embeds = mx.concatenate([ids, more], 1), mx.concatenate([rows, embed(more)], 1)
            return model.language_model(every, inputs_embeds=embeds).logits[0]

        made = logits()
        first = int(made[-1].argmax())
        written = greedy(first, self.stops, lambda said: int(logits(said)[-1].argmax()))
        said = self.processor.tokenizer.decode(list(written), skip_special_tokens=True).strip()
        every = ids[0].tolist()
        token = config.image_token_index
        asked = [
            PICTURE if one == token else one for i, one in enumerate(every) if not (i and one == token == every[i - 1])
        ]
        return Shown(
            len(every), _torch(made), Answer(said, len(written), written[-1] in self.stops, written), tuple(asked),
            {name: _torch(one) for name, one in vision.items()}, {EMBEDDINGS: _torch(rows)},
        )  # fmt: skip


def _torch(array: Any) -> Any:
    import mlx.core as mx
    import numpy as np
    import torch

    return torch.from_numpy(np.array(array.astype(mx.float32)))


def load(checkpoint: Checkpoint, device: Any, visual_encoder: str | None) -> ByMlx:
    """Raises UsageError without mlx-vlm, UnsupportedError where it does not load the folder."""
    try:
        import mlx.core as mx
        import mlx_vlm
    except ImportError as problem:
        pip = "pip install mlx-vlm, on a Mac with Apple's processor; elsewhere 'mlx[cpu]' beside it"
        raise missing("--runtime mlx", "mlx-vlm", problem, pip) from problem
    from mlx.utils import tree_map

    folder = folder_of(checkpoint)
    with reasoned("mlx-vlm", "load", folder):
        model, processor = mlx_vlm.load(str(folder))
    model.update(tree_map(lambda one: one.astype(mx.float32), model.parameters()))
    stops = model.config.eos_token_id
    ids = stops if isinstance(stops, list) else [stops] if stops is not None else [processor.tokenizer.eos_token_id]
    return ByMlx(model, processor, tuple(int(one) for one in ids))
