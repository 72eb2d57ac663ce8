"""The settings of an xtuner training, as far as its checkpoint's conversion needs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from llava_convert.core.errors import UnsupportedError
from llava_convert.core.values import dataclass

Setting = Literal["llm", "visual_encoder", "pretrained_pth", "prompt_template"]


# A config can leave these to code, because an option gives them instead.
_OPTIONS: dict[Setting, str] = {
    "llm": "--llm PATH|ID",
    "visual_encoder": "--visual-encoder PATH|ID",
    "pretrained_pth": "--pretrained-pth PATH",
    "prompt_template": "--prompt-template NAME",
}


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """A `peft.LoraConfig`, with peft 0.12's defaults where the config is silent; the rest is in `other`.

    `token_indices` are the rows of embeddings that were trained alone: of every one, or by the name of the module.
    `patterns_apart`: a release of peft wrote it that looks up `rank_pattern` and `alpha_pattern` each by itself.
    """

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None
    modules_to_save: tuple[str, ...] | None = None
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True
    peft_type: str = "LORA"
    token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()
    patterns_apart: bool = False
    other: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """The settings of one LLaVA training.

    `llm`, `visual_encoder`: path or id of the base model as written, `ms://ID` (`ms://ID@REVISION`) for ModelScope's
    `snapshot_download`, None when the config names none. `*_type`: the class, without `.from_pretrained`.
    `prompt_template`: xtuner's name for it ("llama3_chat"), or the template itself (SYSTEM, INSTRUCTION, ...).
    `llm_dtype` is the dtype that the language model was loaded in (torch's name).
    `pad_image_to_square` is None when the datasets differ or there are none. `data_paths` are the datasets' files, as
    far as the config tells them. `unresolved` tells, by setting, why one that an option can give could not be read; ask
    through `require`.
    """

    llm: str | None
    visual_encoder: str | None
    freeze_llm: bool = False
    freeze_visual_encoder: bool = False
    llm_lora: LoraSettings | None = None
    visual_encoder_lora: LoraSettings | None = None
    pretrained_pth: str | None = None
    prompt_template: str | Mapping[str, Any] | None = None
    visual_select_layer: int = -2
    projector_depth: int = 2
    max_position_embeddings: int | None = None
    quantized_llm: bool = False
    pad_image_to_square: bool | None = None
    data_paths: tuple[str, ...] = ()
    llm_dtype: str | None = None
    unresolved: Mapping[str, str] = field(default_factory=dict)

    @property
    def publish_dtype(self) -> str:
        """The dtype to publish the model in: that of its language model where it has 16 bits, else float16."""
        return self.llm_dtype if self.llm_dtype in ("float16", "bfloat16") else "float16"

    def require(self, setting: Setting) -> str | Mapping[str, Any] | None:
        """The setting; UnsupportedError (exit 4) naming file, line and option when only running the config gives it.

        None means that the config is silent, which is the caller's to judge.
        """
        if setting in self.unresolved:
            raise UnsupportedError(self.unresolved[setting], hint=f"give it with {_OPTIONS[setting]}")
        value: str | Mapping[str, Any] | None = getattr(self, setting)
        return value
