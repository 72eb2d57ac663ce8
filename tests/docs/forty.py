"""Tiny examples of the files and folders that people have, and docs/inspect-forty.md with what `inspect` says of each.

`python -m tests.docs.forty` writes the page.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import llava_convert
from llava_convert.cli import app
from llava_convert.model.tables.families import architectures
from llava_convert.storage.torch.file import read_torch

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "fixtures" / "tiny"
PAGE = ROOT / "docs" / "inspect-forty.md"
HEAD = """\
# What is this folder?

`llava-convert inspect` says what a file or a folder is, what it can be used for and what to type next. Other commands
give the same answer as an error if their source is not a LLaVA. The answer depends on keys of configs, names of tensors
and the first bytes of files, and hardly ever on file names. Replace the words in capitals with your own values.

This page shows files and folders that people have. `make docs` builds a small example of each, and prints the output of
`inspect`. Each kind that is not a LLaVA has a row in `mappings/kinds.toml`.
"""
Thing = Callable[["Folder"], Path]
THINGS: dict[str, Thing] = {}


def thing(title: str) -> Callable[[Thing], Thing]:
    """Register what builds one thing under its title; it returns the path to inspect."""

    def add(build: Thing) -> Thing:
        assert title not in THINGS
        THINGS[title] = build
        return build

    return add


@dataclass(frozen=True)
class Folder:
    """Where things are built. `hf`, `official` and `xtuner` are the tiny model in these layouts."""

    root: Path

    def new(self, name: str) -> Path:
        (self.root / name).mkdir(parents=True)
        return self.root / name

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def json(self, name: str, value: Any) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
        return path

    def bytes(self, name: str, data: bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def torch(self, name: str, value: Any) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(value, path)
        return path

    def tensors(self, name: str, names: Mapping[str, torch.Tensor]) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(names), path, {"format": "pt"})
        return path

    def model(self, name: str, model_type: str, kind: str) -> Path:
        """A folder of transformers: its config, and a file of weights."""
        self.json(f"{name}/config.json", {"model_type": model_type, "architectures": [kind]})
        self.tensors(f"{name}/model.safetensors", {"model.embed_tokens.weight": torch.zeros(2, 2)})
        return self.root / name


def ones(*names: str, dtype: torch.dtype = torch.float16, shape: tuple[int, ...] = (4, 4)) -> dict[str, torch.Tensor]:
    return {name: torch.ones(shape, dtype=dtype) for name in names}


# --- a LLaVA, whole and in parts


@thing("A training's work_dir")
def work_dir(to: Folder) -> Path:
    shutil.copy(TINY / "iter_2.pth", to.new("work_dirs/llava_llama3_8b") / "iter_2.pth")
    (to / "work_dirs/llava_llama3_8b/vis_data").mkdir()
    return to / "work_dirs/llava_llama3_8b"


@thing("A transformers LLaVA")
def hf(to: Folder) -> Path:
    return to / "hf"


@thing("One file of its weights")
def one_file(to: Folder) -> Path:
    return to / "hf/model.safetensors"


@thing("Its config.json")
def its_config(to: Folder) -> Path:
    return to / "hf/config.json"


@thing("Its tokenizer.json")
def its_tokenizer(to: Folder) -> Path:
    return to / "hf/tokenizer.json"


@thing("What xtuner's converter leaves, without a base of its tower")
def xtuner(to: Folder) -> Path:
    return to / "xtuner"


@thing("The projector of stage 1")
def stage_one(to: Folder) -> Path:
    return to / "stage-1"


@thing("A GGUF")
def gguf(to: Folder) -> Path:
    llava_convert.convert(to / "hf", to="gguf", out=to / "gguf", part="llm", outtype="q8_0", name="tiny")
    return to / "gguf/tiny-q8_0.gguf"


@thing("A CLIP")
def clip(to: Folder) -> Path:
    return Path(shutil.copytree(TINY / "vit", to / "clip-vit"))


@thing("A SigLIP")
def siglip(to: Folder) -> Path:
    config = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    to.json("siglip/config.json", config)
    expected = architectures()["siglip"].tensors(architectures()["siglip"].complete(config))
    names = {name.partition(".")[2]: torch.ones(want.shape, dtype=torch.float16) for name, want in expected.items()}
    to.tensors("siglip/model.safetensors", names)
    return to / "siglip"


@thing("A language model")
def language_model(to: Folder) -> Path:
    return Path(shutil.copytree(TINY / "llm", to / "llama-3"))


@thing("A tokenizer")
def tokenizer(to: Folder) -> Path:
    folder = to.new("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "llm" / name, folder / name)
    return folder


@thing("An image processor")
def processor(to: Folder) -> Path:
    shutil.copy(TINY / "vit/preprocessor_config.json", to.new("processor") / "preprocessor_config.json")
    return to / "processor"


@thing("A LoRA of a language model")
def adapter(to: Folder) -> Path:
    weights = load_file(TINY / "llm/model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    rows, columns = weights[f"{name}.weight"].shape
    at = f"base_model.model.{name}"
    factors = {f"{at}.lora_A.weight": torch.ones(4, columns), f"{at}.lora_B.weight": torch.ones(rows, 4)}
    to.tensors("lora/adapter_model.safetensors", factors)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    to.json("lora/adapter_config.json", config)
    return to / "lora"


@thing("A language model of another family")
def other_language_model(to: Folder) -> Path:
    return to.model("gpt2", "gpt2", "GPT2LMHeadModel")


# --- quantised


def quantised(to: Folder, name: str, config: dict[str, Any], pack: Callable[[str, torch.Tensor], Any]) -> Path:
    """The transformers LLaVA with the linear layers of its language model packed."""
    folder = Path(shutil.copytree(to / "hf", to / name))
    (folder / "conversion.json").unlink()
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | config))
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.startswith("language_model.model.layers") and "_proj." in key]:
        tensors |= pack(key.removesuffix("weight"), tensors.pop(key))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@thing("A LLaVA quantised by GPTQ")
def gptq(to: Folder) -> Path:
    def pack(at: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        return {
            f"{at}qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
            f"{at}qzeros": torch.zeros(1, rows // 8, dtype=torch.int32),
            f"{at}scales": torch.ones(1, rows, dtype=torch.float16),
            f"{at}g_idx": torch.zeros(columns, dtype=torch.int32),
        }

    return quantised(to, "llava-gptq", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, pack)


@thing("A LLaVA in FP8")
def fp8(to: Folder) -> Path:
    def pack(at: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.float().abs().amax(1, keepdim=True) / 448
        return {
            f"{at}weight": (weight.float() / scale).to(torch.float8_e4m3fn),
            f"{at}weight_scale": scale.bfloat16(),
        }

    said = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
    return quantised(to, "llava-fp8", {"quantization_config": said}, pack)


@thing("A LLaVA in 4 bits for MLX")
def mlx(to: Folder) -> Path:
    def pack(at: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        return {
            f"{at}weight": torch.zeros(rows, columns // 8, dtype=torch.uint32),
            f"{at}scales": torch.ones(rows, 1, dtype=torch.float16),
            f"{at}biases": torch.ones(rows, 1, dtype=torch.float16),
        }

    return quantised(to, "llava-mlx", {"quantization": {"group_size": 64, "bits": 4}}, pack)


# --- what trainers leave


@thing("The output folder of a training by transformers' Trainer")
def trainer_run(to: Folder) -> Path:
    for step in (2, 10):
        shutil.copytree(to / "hf", to / f"run/checkpoint-{step}")
        to.json(f"run/checkpoint-{step}/trainer_state.json", {"global_step": step, "log_history": []})
    return to / "run"


@thing("A checkpoint of Trainer whose weights lie in DeepSpeed's folder")
def trainer_deepspeed(to: Folder) -> Path:
    folder = Path(shutil.copytree(to / "hf", to / "run-zero/checkpoint-2"))
    (folder / "model.safetensors").unlink()
    (folder / "global_step2").mkdir()
    return folder


@thing("An optimizer's state")
def optimizer(to: Folder) -> Path:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    made = torch.optim.AdamW([weight])
    weight.sum().backward()
    made.step()
    return to.torch("run/checkpoint-2/optimizer.pt", made.state_dict())


@thing("A scheduler's state")
def scheduler(to: Folder) -> Path:
    made = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    return to.torch("run/checkpoint-2/scheduler.pt", torch.optim.lr_scheduler.StepLR(made, 1).state_dict())


@thing("The state of random generators")
def random_state(to: Folder) -> Path:
    return to.torch("run/checkpoint-2/rng_state.pth", {"python": (3,), "numpy": (1,), "cpu": torch.get_rng_state()})


class TrainingArguments:
    """Stands for transformers' class, whose objects Trainer pickles."""

    learning_rate = 1e-5


@thing("training_args.bin")
def training_args(to: Folder) -> Path:
    return to.torch("run/checkpoint-2/training_args.bin", TrainingArguments())


@thing("trainer_state.json")
def trainer_state(to: Folder) -> Path:
    return to / "run/checkpoint-2/trainer_state.json"


@thing("A distributed checkpoint of torch")
def distributed(to: Folder) -> Path:
    import torch.distributed.checkpoint as dcp

    folder = to.new("dcp")
    state = {"model": load_file(to / "hf/model.safetensors")}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


@thing("A checkpoint of Megatron-LM")
def megatron(to: Folder) -> Path:
    to.bytes("megatron/latest_checkpointed_iteration.txt", b"100")
    return to.torch("megatron/iter_0000100/mp_rank_00/model_optim_rng.pt", {"args": 1}).parents[2]


@thing("A checkpoint of Sa2VA")
def sa2va(to: Folder) -> Path:
    at = "mllm.model.language_model.base_model.model.model.layers.0.self_attn.q_proj"
    names = ones(f"{at}.lora_A.default.weight", "grounding_encoder.sam2_model.mask.weight", "text_hidden_fcs.0.weight")
    return to.torch("sa2va.pth", {"state_dict": names, "meta": {}})


# --- other models


@thing("A text encoder for ComfyUI")
def comfy(to: Folder) -> Path:
    weight = ones("model.layers.0.self_attn.q_proj.weight", dtype=torch.float8_e4m3fn)
    return to.tensors("llava_llama3_fp8_scaled.safetensors", weight | ones("scaled_fp8", dtype=torch.float8_e4m3fn))


@thing("A Stable Diffusion in one file")
def stable_diffusion(to: Folder) -> Path:
    names = ones("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight")
    return to.tensors("v1-5-pruned.safetensors", names)


@thing("A LoRA of an image generator")
def image_lora(to: Folder) -> Path:
    return to.tensors("style.safetensors", ones("lora_unet_down_blocks_0.lora_down.weight"))


@thing("A pipeline of diffusers")
def diffusers(to: Folder) -> Path:
    to.json("sdxl/model_index.json", {"_class_name": "StableDiffusionXLPipeline"})
    return to / "sdxl"


for _title, _type, _class in (
    ("A Qwen2-VL", "qwen2_vl", "Qwen2VLForConditionalGeneration"),
    ("An InternVL", "internvl_chat", "InternVLChatModel"),
    ("A MiniCPM-V", "minicpmv", "MiniCPMV"),
    ("An Idefics", "idefics3", "Idefics3ForConditionalGeneration"),
    ("A PaliGemma", "paligemma", "PaliGemmaForConditionalGeneration"),
    ("A VipLLaVA of transformers", "vipllava", "VipLlavaForConditionalGeneration"),
    ("A Video-LLaVA of transformers", "video_llava", "VideoLlavaForConditionalGeneration"),
    ("A LLaVA-NeXT-Video of transformers", "llava_next_video", "LlavaNextVideoForConditionalGeneration"),
):
    THINGS[_title] = lambda to, kind=_type, name=_class: to.model(kind, kind, name)  # type: ignore[misc]


@thing("Meta's Llama")
def meta(to: Folder) -> Path:
    to.json("Meta-Llama-3-8B/params.json", {"dim": 4096})
    return to.torch("Meta-Llama-3-8B/consolidated.00.pth", ones("tok_embeddings.weight")).parent


@thing("A model of ONNX")
def onnx(to: Folder) -> Path:
    return to.bytes("model.onnx", b"\x08\x07\x12\x07pytorch\x1a\x052.1.0")


@thing("A model in the hub's cache")
def hub_cache(to: Folder) -> Path:
    folder = to.new("models--org--llava")
    (folder / "blobs").mkdir()
    to.bytes("models--org--llava/refs/main", b"0123abcd")
    shutil.copytree(to / "hf", folder / "snapshots/0123abcd")
    return folder


# --- what is no model


@thing("A picture")
def picture(to: Folder) -> Path:
    return Path(shutil.copy(TINY / "picture.png", to / "picture.png"))


@thing("Training data")
def data(to: Folder) -> Path:
    entry = {"id": "1", "image": "1.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}
    return to.json("llava_v1_5_mix665k.json", [entry])


@thing("A zip of a model")
def zipped(to: Folder) -> Path:
    with zipfile.ZipFile(to / "llava.zip", "w") as archive:
        for file in sorted((to / "hf").iterdir()):
            archive.write(file, file.name)
    return to / "llava.zip"


@thing("A tar of a model")
def tarred(to: Folder) -> Path:
    with tarfile.open(to / "llava.tar", "w") as archive:
        archive.add(to / "hf", "hf")
    return to / "llava.tar"


@thing("A training config of xtuner")
def config_py(to: Folder) -> Path:
    text = read_torch(TINY / "iter_2.pth").root["meta"]["cfg"]
    return to.bytes("llava_finetune.py", text.encode())


@thing("A README")
def readme(to: Folder) -> Path:
    return to.bytes("run/README.md", b"# A model\n")


def build(root: Path) -> dict[str, Path]:
    """Build everything below `root`; returns the path to inspect by title."""
    to = Folder(root)
    for base in ("llm", "vit"):  # as the training config of iter_2.pth names them
        shutil.copytree(TINY / base, to / "tiny" / base)
    bases = {"llm": str(TINY / "llm"), "visual_encoder": str(TINY / "vit")}
    for layout in ("hf", "official", "xtuner"):
        llava_convert.convert(TINY / "iter_2.pth", to=layout, out=to / layout, **bases)
    llava_convert.convert(to / "official", to="official", part="projector", out=to / "stage-1")
    named = {"_name_or_path": str(TINY / "llm"), "mm_vision_tower": str(TINY / "vit")}
    config = json.loads((to / "stage-1/config.json").read_text())
    (to / "stage-1/config.json").write_text(json.dumps(config | named))
    return {title: make(to) for title, make in THINGS.items()}


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def inspected(path: Path) -> str:
    """What `inspect` prints of one thing. It has to know it."""
    found = CliRunner().invoke(app, ["inspect", str(path)])
    assert found.exit_code == 0, f"{path}: {found.output}"
    return found.output


def page() -> str:
    """The page, as everything is now."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(action="ignore"):
        root = Path(name).resolve()
        with contextlib.redirect_stderr(io.StringIO()):
            things = build(root)
        with inside(root):
            parts = [_part(title, path.relative_to(root)) for title, path in things.items()]
    return "\n".join([HEAD, *parts]).replace(str(TINY), "BASES")


def _part(title: str, path: Path) -> str:
    text = "\n".join(line.rstrip() for line in inspected(path).strip().splitlines())
    return f"## {title}\n\n```console\n$ llava-convert inspect {path}\n{text}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
