"""The recipe as an xtuner config: what a checkpoint carries as `meta.cfg`, and what `xtuner convert` asks for.

It holds what concerns the model, the tokenizer and the data as xtuner spells them, so that the real xtuner converts,
resumes or goes on with what is trained here.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from llava_convert.core.errors import UnsupportedError

from .formats import FORMATS
from .recipe import PARTS, Lora, Recipe, TrainRecipe

_HEAD = """\
import torch
{imports}from mmengine.hooks import CheckpointHook, DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR, OptimWrapper
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, {processor}, {tower}

from xtuner.dataset import ConcatDataset
{readers}from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.dataset.map_fns import {map_fn}, template_map_fn_factory
from xtuner.engine.hooks import DatasetInfoHook
from xtuner.engine.runner import TrainLoop
from xtuner.model import LLaVAModel
from xtuner.utils import PROMPT_TEMPLATE

llm_name_or_path = {llm!r}
visual_encoder_name_or_path = {vit!r}
pretrained_pth = {pretrained!r}
data_root = {root!r}
prompt_template = PROMPT_TEMPLATE.{template}
max_length = {max_length}

batch_size = {batch_size}
accumulative_counts = {accumulate}
dataloader_num_workers = {workers}
max_epochs = {epochs!r}
optim_type = AdamW
lr = {lr!r}
betas = {betas!r}
weight_decay = {weight_decay!r}
max_norm = {max_norm!r}
warmup_ratio = {warmup!r}
save_steps = {save_steps}
save_total_limit = {keep}

tokenizer = dict(
    type=AutoTokenizer.from_pretrained,
    pretrained_model_name_or_path=llm_name_or_path,
    trust_remote_code=True,
    padding_side='right')

image_processor = dict(
    type={processor}.from_pretrained,
    pretrained_model_name_or_path=visual_encoder_name_or_path,
    trust_remote_code=True)

model = dict(
    type=LLaVAModel,
    freeze_llm={freeze_llm},
    freeze_visual_encoder={freeze_vit},
    visual_select_layer={select_layer},
    projector_depth={depth},
    pretrained_pth=pretrained_pth,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=llm_name_or_path,
        {llm_options}trust_remote_code=True),
"""

_QUANTISED = """torch_dtype=torch.float16,
        quantization_config=dict(
            type=BitsAndBytesConfig,
            load_in_4bit=True,
            load_in_8bit=False,
            llm_int8_threshold=6.0,
            llm_int8_has_fp16_weight=False,
            bnb_4bit_compute_dtype=torch.float16,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type='nf4'),
        """

_DATASET = """
{name} = dict(
    type={reader},
    data_path={file},
    image_folder={images},
    tokenizer=tokenizer,
    image_processor=image_processor,
    dataset_map_fn={map_fn},
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template),
    max_length=max_length,
    pad_image_to_square={pad}{most})
"""

_TAIL = """
train_dataset = {dataset}
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=dataloader_num_workers,
    pin_memory=True,
    dataset=train_dataset,
    sampler=dict({sampler}),
    collate_fn=dict(type=default_collate_fn))

optim_wrapper = dict(
    type={wrapper},
    optimizer=dict(type=optim_type, lr=lr, betas=betas, eps={eps!r}, weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm, error_if_nonfinite=False),
    accumulative_counts=accumulative_counts{rates}{amp})
param_scheduler = [
{warm}    dict(
        type=CosineAnnealingLR,
        eta_min=0.0,
        {cosine})]
train_cfg = dict(type=TrainLoop, {length})

custom_hooks = [dict(type=DatasetInfoHook, tokenizer=tokenizer)]
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval={log_every}),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=save_steps, max_keep_ckpts=save_total_limit),
    sampler_seed=dict(type=DistSamplerSeedHook))
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))
visualizer = None
log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed={seed}, deterministic=False)
log_processor = dict(by_epoch=False)
"""

_WARM = """\
    dict(
        type=LinearLR,
        start_factor={start!r},
        {span}),
"""
_IMPORTS = {
    "shuffle": "from mmengine.dataset import DefaultSampler",
    "length_grouped": "from xtuner.dataset.samplers import LengthGroupedSampler",
}
_SAMPLERS = {
    "shuffle": "type=DefaultSampler, shuffle=True",
    "length_grouped": """
        type=LengthGroupedSampler,
        length_property='modality_length',
        per_device_batch_size=batch_size * accumulative_counts""",
}
# A part of the schedule, in epochs or, where the recipe counts them, in iterations.
_EPOCHS = "by_epoch=True,\n        begin={},\n        end={},\n        convert_to_iter_based=True"
_ITERATIONS = "by_epoch=False,\n        begin={},\n        end={}"


def as_xtuner_config(recipe: Recipe, *, image_tokens: int = 0, warm: bool = True) -> str:
    """The config's text. `image_tokens` are taken off the recipe's `max_length`, as the originals' configs do.

    Without `warm` the run is too short for its warm-up, which is then left out.

    LLaVA's plain template, which xtuner lacks, is written as vicuna with the pictures alone asked: nothing of a
    conversion depends on it. Raises UnsupportedError for LoRA settings that are no literals there.
    """
    model, data, train = recipe.model, recipe.data, recipe.train
    plain = data.prompt_template == "plain"
    readers = dict.fromkeys(FORMATS[one.format].xtuner for one in data.sets)
    tower = "SiglipVisionModel" if "siglip" in model.visual_encoder.lower() else "CLIPVisionModel"
    map_fn = "llava_image_only_map_fn" if plain else "llava_map_fn"
    dtypes = {"fp32": "torch_dtype=torch.float32,\n        ", "bf16": "torch_dtype=torch.bfloat16,\n        "}
    dtypes["fp16"] = "torch_dtype=torch.float16,\n        "
    text = _HEAD.format(
        imports=f"{_IMPORTS[data.sampler]}\n",
        readers="".join(f"from {module} import {name}\n" for module, name in readers),
        processor=tower.replace("VisionModel", "ImageProcessor").replace("Clip", "CLIP"),
        tower=tower,
        map_fn=map_fn,
        llm=model.llm,
        vit=model.visual_encoder,
        pretrained=model.pretrained or None,
        root=f"{data.root.rstrip('/') or '/' * data.root.startswith('/') or '.'}/".replace("//", "/"),
        template="vicuna" if plain else data.prompt_template,
        max_length=data.max_length - image_tokens,
        batch_size=train.batch_size,
        accumulate=train.accumulate,
        workers=data.workers,
        epochs=train.epochs,
        lr=train.lr,
        betas=tuple(train.betas),
        weight_decay=train.weight_decay,
        max_norm=train.max_norm,
        warmup=train.warmup_ratio,
        save_steps=train.save_steps,
        keep=train.keep,
        freeze_llm=model.freeze_llm,
        freeze_vit=model.freeze_visual_encoder,
        select_layer=model.select_layer,
        depth=model.projector_depth,
        llm_options=(_QUANTISED if model.quantization else dtypes[model.llm_dtype])
        + (f"attn_implementation={model.attention!r},\n        " if model.attention else ""),
    )
    text += "    visual_encoder=dict(\n"
    text += f"        type={tower}.from_pretrained,\n        pretrained_model_name_or_path=visual_encoder_name_or_path)"
    text += _lora("llm_lora", model.llm_lora, "CAUSAL_LM") + _lora(
        "visual_encoder_lora", model.visual_encoder_lora, None
    )
    text += ")\n"
    names = []
    for number, one in enumerate(data.sets):
        name = "".join(c if c.isalnum() else "_" for c in one.name) + f"_{number}"
        names += [name] * one.repeats
        text += _DATASET.format(
            name=name,
            reader=FORMATS[one.format].xtuner[1],
            most=f",\n    max_dataset_length={one.max_rows}" if one.max_rows else "",
            file=_under_root(one.file),
            images=_under_root(one.images),
            map_fn=map_fn,
            pad=data.pad_image_to_square,
        )
    half = train.dtype != "fp32"
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(train.dtype)
    if train.max_iters:
        until, end, part = str(int(train.warmup_ratio * train.max_iters)), str(train.max_iters), _ITERATIONS
    else:
        until, end, part = "warmup_ratio * max_epochs", "max_epochs", _EPOCHS
    warm = warm and train.warmup_ratio > 0
    return text + _TAIL.format(
        dataset=names[0] if len(names) == 1 else f"dict(type=ConcatDataset, datasets=[{', '.join(names)}])",
        wrapper="AmpOptimWrapper" if half else "OptimWrapper",
        eps=train.eps,
        amp=f",\n    loss_scale='dynamic',\n    dtype={dtype!r}" if half else "",
        sampler=_SAMPLERS[data.sampler],
        rates=_rates(train),
        warm=_WARM.format(start=train.warmup_start, span=part.format(0, until)) if warm else "",
        cosine=part.format(until if warm else 0, end),
        length=f"max_iters={end}" if train.max_iters else "max_epochs=max_epochs",
        log_every=train.log_every,
        seed=train.seed,
    )


def _rates(train: TrainRecipe) -> str:
    """Rates of single parts, as factors of the common one."""
    own = {part: train.rate_of(part) / train.lr for part in PARTS if train.rate_of(part) != train.lr}
    words = ", ".join(f"{part!r}: dict(lr_mult={factor!r})" for part, factor in own.items())
    return f",\n    paramwise_cfg=dict(custom_keys={{{words}}})" if own else ""


def _under_root(path: str) -> str:
    return repr(path) if PurePosixPath(path).is_absolute() else f"data_root + {path!r}"


def _lora(name: str, lora: Lora | None, task: str | None) -> str:
    if lora is None:
        return ""
    if lora.bias not in ("none", "all", "lora_only"):
        raise UnsupportedError(f"{name}.bias {lora.bias!r}: peft knows none, all and lora_only")
    words = f"r={lora.r}, lora_alpha={lora.alpha!r}, lora_dropout={lora.dropout!r}, bias={lora.bias!r}"
    words += f", target_modules={list(lora.target_modules)!r}" if lora.target_modules else ""
    words += f", task_type={task!r}" if task else ""
    return f",\n    {name}=dict(type=LoraConfig, {words})"
