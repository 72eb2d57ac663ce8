"""LLaVA as it is trained: a language model, a vision tower and the projector between them, under xtuner's names.

What a checkpoint holds of it, and in which order, is xtuner 0.1.23's (model/llava.py): the tower, the language model,
the projector; of a part under LoRA the adapter alone; of a frozen part nothing.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionModel, SiglipVisionModel

from llava_convert.core.errors import InputError, UnsupportedError, UsageError
from llava_convert.core.tensors import StoredTensor
from llava_convert.layouts.base import OpenOptions
from llava_convert.layouts.registry import open_checkpoint
from llava_convert.model.checkpoint import LLM, PROJECTOR, VISION
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.streams import read_whole
from llava_convert.storage.torch.file import read_torch, state_dict
from llava_convert.storage.zero.checkpoint import read_zero

from .conversations import IMAGE_INDEX
from .data import IGNORE_INDEX
from .recipe import Lora, ModelRecipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOWERS = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}
State = OrderedDict[str, torch.Tensor]


class Projector(nn.Module):
    """A linear layer, then GELU and a linear layer for each further step of depth."""

    def __init__(self, wide_in: int, wide_out: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(wide_in, wide_out)]
        for _ in range(1, depth):
            layers += [nn.GELU(), nn.Linear(wide_out, wide_out)]
        self.model = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.model(features))


class Tower(nn.Module):
    """A vision tower whose tensors are called `vision_model.…`, as in xtuner's checkpoints.

    transformers 5.6 took that inner module away; before, it is the one inside.
    """

    def __init__(self, name: str, *, recompute: dict[str, bool] | None, empty: bool = False) -> None:
        super().__init__()
        config = vision_config(name)
        cls = TOWERS[config.model_type]
        with loading(name):
            tower = cls(config) if empty else cls.from_pretrained(name, dtype=torch.float32)
        if recompute:
            _recompute_activations(tower, recompute)
        # Not called `config`: peft would take this module for one of transformers' own.
        self.vision_config = tower.config
        self.vision_model = getattr(tower, "vision_model", tower)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Every hidden state, the embeddings' first: (pictures, positions, hidden size) each."""
        found = self.vision_model(pixel_values, output_hidden_states=True)
        return cast(tuple[torch.Tensor, ...], found.hidden_states)


class Llava(nn.Module):
    """The three parts; `forward` gives the loss of a batch. `empty`: of the right shapes, no weight loaded.

    `reentrant` is the kind of gradient checkpointing that ZeRO-3 takes: the other one compares what it recomputes with
    parameters that have been spread out again.

    Raises UsageError for a quantised base without a GPU, UnsupportedError for a tower of another kind.
    """

    def __init__(self, recipe: ModelRecipe, *, empty: bool = False, reentrant: bool = False) -> None:
        super().__init__()
        self.recipe = recipe
        recompute = {"use_reentrant": reentrant} if recipe.gradient_checkpointing else None
        with torch.random.fork_rng():  # so that what is new starts the same however the bases are loaded
            self.llm = _language_model(recipe, empty=empty)
            self.visual_encoder: Any = Tower(recipe.visual_encoder, recompute=recompute, empty=empty)
        vision = self.visual_encoder.vision_config
        self.projector = Projector(vision.hidden_size, self.llm.config.hidden_size, recipe.projector_depth)
        self.first_patch = int(vision.model_type == "clip_vision_model")  # CLIP puts a class token first
        self.llm.config.use_cache = False
        if recipe.freeze_llm:
            self.llm.requires_grad_(False)
        if recipe.freeze_visual_encoder:
            self.visual_encoder.requires_grad_(False)
        if recompute:
            _recompute_activations(self.llm, recompute)
        if reentrant and (recipe.visual_encoder_lora or not recipe.freeze_visual_encoder):
            # Reentrant checkpoints give no gradient to what is inside where nothing that comes in wants one.
            embeddings = self.visual_encoder.vision_model.embeddings
            embeddings.register_forward_hook(lambda _, __, out: out.requires_grad_())
        if recipe.llm_lora is not None:
            self.llm = _with_lora(self.llm, recipe.llm_lora, quantised=bool(recipe.quantization), task="CAUSAL_LM")
        if recipe.visual_encoder_lora is not None:
            self.visual_encoder = _with_lora(
                self.visual_encoder, recipe.visual_encoder_lora, quantised=False, task=None
            )
        if recipe.pretrained:
            self.load_trained(read_trained(Path(recipe.pretrained)), recipe.pretrained)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the language model sees of pictures: (pictures, patches, its hidden size)."""
        hidden = self.visual_encoder(pixels)[self.recipe.select_layer]
        return cast(torch.Tensor, self.projector(hidden[:, self.first_patch :]))

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
    ) -> torch.Tensor:
        """The mean loss over the answers' tokens of a batch; the picture takes the place of its marker.

        ids, labels and mask are (samples, tokens), pictures (samples, 3, size, size): one a sample, seen or not.
        Without labels: the logits of what comes next, (samples, vocabulary).
        """
        embed = self.llm.get_input_embeddings()
        rows, targets = [], []
        for ids, wanted, mask, picture in zip(
            input_ids, input_ids if labels is None else labels, attention_mask, self.features(pixel_values), strict=True
        ):
            ids, wanted = ids[mask], wanted[mask]
            words = embed(ids.clamp(min=0))
            marks = (ids == IMAGE_INDEX).nonzero().flatten().tolist()
            at = marks[0] if marks else len(ids)
            seen = picture.to(words.dtype) if marks else picture.to(words.dtype)[:0]  # in the graph all the same
            rows.append(torch.cat([words[:at], seen, words[at + 1 :]]))
            blank = wanted.new_full((len(seen),), IGNORE_INDEX)
            targets.append(torch.cat([wanted[:at], blank, wanted[at + 1 :]]))
        pad = nn.utils.rnn.pad_sequence
        lengths = torch.tensor([len(row) for row in rows], device=input_ids.device)
        places = torch.arange(int(lengths.max()), device=input_ids.device)
        real = places < lengths[:, None]
        found = self.llm(
            inputs_embeds=pad(rows, batch_first=True),
            attention_mask=real,
            position_ids=torch.where(real, places, 0),
            labels=None if labels is None else pad(targets, batch_first=True, padding_value=IGNORE_INDEX),
        )
        if labels is None:
            return cast(torch.Tensor, found.logits[torch.arange(len(rows)), lengths - 1])
        return cast(torch.Tensor, found.loss)

    def trained_state(self, state: Mapping[str, torch.Tensor] | None = None) -> State:
        """What training changes, under the names and in the order of xtuner's checkpoints.

        `state` is the whole state dict where it is not simply this module's (gathered from several processes).
        """
        state = self.state_dict() if state is None else state
        found: State = OrderedDict()
        for part, lora, frozen in (
            ("visual_encoder", self.recipe.visual_encoder_lora, self.recipe.freeze_visual_encoder),
            ("llm", self.recipe.llm_lora, self.recipe.freeze_llm),
            ("projector", None, False),
        ):
            for name, tensor in state.items():
                # Of a part under LoRA the original takes every adapter of the model: the language model's come along
                # with the tower's then, in front of them.
                here = name.startswith(f"{part}.") or (lora is not None and ".lora_" in name)
                if here and _is_trained(name, lora, frozen=frozen):
                    found[name] = tensor
        return found

    def require_fit(self, found: Mapping[str, Sequence[int]], where: str) -> None:
        """Raises InputError where a trained tensor, by name and shape, has no place here."""
        mine = dict(self.named_parameters(remove_duplicate=False))
        # ZeRO-3 leaves of a parameter no more than its share, and what its shape was.
        shapes = {name: getattr(one, "ds_shape", one.shape) for name, one in mine.items() if name in found}
        wrong = [name for name, shape in found.items() if tuple(shapes.get(name, ())) != tuple(shape)]
        if wrong:
            raise InputError(
                f"{where}: {len(wrong)} tensors do not fit this model, for instance {wrong[0]}",
                hint="is it a checkpoint of these base models, with the same parts under LoRA?",
            )

    def load_trained(self, state: Mapping[str, torch.Tensor], where: str, *, complete: bool = False) -> None:
        """Put trained tensors in their places, by xtuner's names.

        Raises InputError for names or shapes not here; with `complete` also where a tensor is missing that is trained.
        What is there of a part under LoRA without the adapter's infix does not fit and is refused too, where xtuner
        passes over it in silence.
        """
        self.require_fit({name: tensor.shape for name, tensor in state.items()}, where)
        mine = dict(self.named_parameters(remove_duplicate=False))
        missing = [name for name in self.trained_state() if complete and name not in state]
        if missing:
            raise InputError(
                f"{where}: lacks {len(missing)} tensors which this recipe trains, for instance {missing[0]}",
                hint="resume with the recipe that it was trained with; as model.pretrained it can start a new run",
            )
        with torch.no_grad():
            for name, tensor in state.items():
                with _whole(mine[name]):
                    mine[name].copy_(tensor)


def _whole(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """The parameter in one piece, where ZeRO-3 has spread it out; what is written to it is spread out again."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return cast(AbstractContextManager[Any], GatheredParameters(parameter, modifier_rank=0))


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Whatever transformers raises for a base model that it cannot load becomes an InputError."""
    hint = "model.llm and model.visual_encoder are folders, or ids of the hub: --set model.llm=FOLDER"
    if Path(name).is_absolute() and not Path(name).is_dir():  # which transformers takes for an id of the hub
        raise InputError(f"{name}: there is no such folder", hint=hint)
    try:
        yield
    except (OSError, ValueError) as problem:
        raise InputError(
            f"{name}: cannot be loaded: {str(problem).splitlines()[0]}",
            hint=hint,
        ) from problem


def vision_config(name: str) -> Any:
    """The config of a vision tower. Raises UnsupportedError for a kind that no projector here reads."""
    with loading(name):
        config = AutoConfig.from_pretrained(name)
    config = getattr(config, "vision_config", config)
    if config.model_type not in TOWERS:
        raise UnsupportedError(f"{name}: a tower of type {config.model_type}; known: {', '.join(TOWERS)}")
    return config


def _language_model(recipe: ModelRecipe, *, empty: bool) -> Any:
    if empty:
        with loading(recipe.llm):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(recipe.llm))
    options: dict[str, Any] = {"dtype": DTYPES[recipe.llm_dtype]}
    if recipe.attention:
        if recipe.attention == "flash_attention_2" and find_spec("flash_attn") is None:
            raise UsageError(
                "model.attention flash_attention_2 needs flash-attn, which is not installed",
                hint="pip install flash-attn, or --set model.attention=sdpa",
            )
        options["attn_implementation"] = recipe.attention
    if recipe.quantization:
        if find_spec("bitsandbytes") is None:
            raise UsageError(
                f"model.quantization {recipe.quantization} needs bitsandbytes, which is not installed",
                hint="pip install 'llava-convert[qlora]', or --set model.quantization=\"\"",
            )
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[recipe.llm_dtype],
        )
        options["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    with loading(recipe.llm):
        return AutoModelForCausalLM.from_pretrained(recipe.llm, **options)


def _recompute_activations(model: Any, how: dict[str, bool]) -> None:
    """Gradient checkpointing, whatever this transformers calls it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(how)
    else:
        model.gradient_checkpointing_enable(how)


def _with_lora(part: Any, lora: Lora, *, quantised: bool, task: str | None) -> Any:
    """The part with an adapter, its own weights frozen."""
    # peft imports bitsandbytes where it is installed, which on some CPUs asks for one package more.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if quantised:
        part = prepare_model_for_kbit_training(part, use_gradient_checkpointing=False)  # the caller saw to that
    linear = {n.rpartition(".")[2] for n, m in part.named_modules() if isinstance(m, nn.Linear)}
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias=lora.bias,
        task_type=task,
        target_modules=sorted(lora.target_modules or linear - {"lm_head", "output_layer"}),
    )
    return get_peft_model(part, config)


def _is_trained(name: str, lora: Lora | None, *, frozen: bool) -> bool:
    if lora is None:
        return not frozen
    return ".lora_" in name or (lora.bias == "all" and name.endswith("bias"))


def read_trained(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a stage-1 checkpoint of any layout, by xtuner's names, nothing of it executed."""
    with FilePool() as pool:
        return {name: as_tensor(read_whole(pool, one), one.dtype) for name, one in stored_trained(path).items()}


def stored_trained(path: Path) -> dict[str, StoredTensor]:
    """The same by their headers."""
    checkpoint, _ = open_checkpoint(path, None, OpenOptions())
    stored: dict[str, StoredTensor] = {}
    if checkpoint.layout == "pth":
        path = checkpoint.path
        stored |= read_zero(path).tensors if path.is_dir() else state_dict(read_torch(path)).tensors
    else:
        for part, prefix in ((LLM, "llm"), (VISION, "visual_encoder"), (PROJECTOR, "projector.model")):
            adapter = checkpoint.parts[part].adapter
            stored |= {f"{prefix}.{n.partition('.')[2]}": t for n, t in checkpoint.parts[part].weights.items()}
            for name, tensor in adapter.tensors.items() if adapter else ():
                # In a model peft names the adapter too, in its files not.
                name = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
                stored[f"{prefix}.base_model.model.{name.partition('.')[2]}"] = tensor
    return stored


def as_tensor(values: Any, dtype: str) -> torch.Tensor:
    """An array of `read_whole` as a tensor of its dtype."""
    tensor = torch.from_numpy(values.copy())
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor
