"""A LLaVA in memory, computed by transformers' classes of its two halves and the projector between them.

Any layout comes here as the planner makes it, in canonical names, and no file is written. The parts are put together as
xtuner 0.1.23 (tools/chat.py) and LLaVA (llava_arch.py) do: the picture's rows in place of `<image>`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llava_convert.app.ask.pictures import Eyes
from llava_convert.app.ask.prompts import Message, Words
from llava_convert.app.ask.runtimes import TRANSFORMERS, Answer, Stream
from llava_convert.assets.bundle import Artefacts
from llava_convert.core.errors import UnsupportedError, UsageError
from llava_convert.core.progress import Reporter
from llava_convert.core.quiet import quiet_bitsandbytes
from llava_convert.core.tensors import FROM_TORCH_NAMES
from llava_convert.core.values import dataclass
from llava_convert.engine.execute import in_memory
from llava_convert.engine.plan import make_plan
from llava_convert.model.checkpoint import LLM, PROJECTOR, VISION
from llava_convert.model.configs import family
from llava_convert.model.facts import ACTIVATION, value_of
from llava_convert.model.recipe import Model
from llava_convert.model.target import FileSet, Output, Target
from llava_convert.storage.ranges import FilePool

if TYPE_CHECKING:
    from PIL.Image import Image

_TOWERS = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}
_INNER = "vision_model."  # transformers 5.6 took that module away


@dataclass
class TransformersRuntime:
    """The parts of a model, its words and its eyes."""

    llm: Any
    tower: Any
    projector: Any
    words: Words
    eyes: Eyes
    layer: int
    first: int
    device: Any
    dtype: Any
    name: str = TRANSFORMERS

    def pixels(self, picture: Image) -> Any:
        """(1, 3, size, size) on the model's device."""
        return self.eyes.pixels(picture).to(self.device, self.dtype)

    def hidden(self, pixels: Any) -> tuple[Any, ...]:
        """Every hidden state of the tower, that of the embeddings first: (1, positions, width) each."""
        found: tuple[Any, ...] = self.tower(pixels, output_hidden_states=True).hidden_states
        return found

    def selected(self, hidden: tuple[Any, ...]) -> Any:
        """What the projector reads of them: (1, patches, width)."""
        return hidden[self.layer][:, self.first :]

    def rows(self, messages: Sequence[Message], pictures: Sequence[Image]) -> Any:
        """A conversation as the language model sees it: (1, positions, width). Raises UsageError for other counts."""
        chunks = self.words.chunks(messages)
        if len(chunks) - 1 != len(pictures):
            raise UsageError(
                f"{len(pictures)} pictures for {len(chunks) - 1} <image> in the conversation",
                hint="write one <image> for each picture",
            )
        seen = [self.projector(self.selected(self.hidden(self.pixels(picture)))) for picture in pictures]
        return self.embedded(chunks, seen)

    def embedded(self, chunks: Sequence[Sequence[int]], seen: Sequence[Any]) -> Any:
        """The rows of ids with those of pictures between them."""
        import torch

        embed = self.llm.get_input_embeddings()
        rows = []
        for i, chunk in enumerate(chunks):
            rows.append(embed(torch.tensor([list(chunk)], dtype=torch.long, device=self.device)).to(self.dtype))
            rows += [seen[i]] if i < len(seen) else []
        return torch.cat(rows, dim=1)

    def answer(
        self, messages: Sequence[Message], pictures: Sequence[Image], *, limit: int, stream: Stream | None = None
    ) -> Answer:
        import torch
        from transformers import GenerationConfig

        with torch.inference_mode():
            rows = self.rows(messages, pictures)
            settings = GenerationConfig(
                do_sample=False,
                max_new_tokens=limit,
                eos_token_id=list(self.words.stop_ids) or None,
                pad_token_id=self.words.pad_id,
            )
            more: dict[str, Any] = {}
            if self.words.stop_words:
                more = {"stop_strings": list(self.words.stop_words), "tokenizer": self.words.tokenizer}
            ids = self.llm.generate(
                inputs_embeds=rows,
                attention_mask=torch.ones(rows.shape[:2], dtype=torch.long, device=self.device),
                generation_config=settings,
                streamer=None if stream is None else _streamer(self.words.tokenizer, stream),
                **more,
            )[0].tolist()
        text = self.words.decoded(ids)
        ended = bool(ids) and (ids[-1] in self.words.stop_ids or text.endswith(self.words.stop_words or ("\0",)))
        return Answer(text, len(ids), ended, tuple(ids))


def load(
    model: Model, made: Artefacts, say: Reporter, *, device: str | None, dtype: str | None, four_bit: bool
) -> TransformersRuntime:
    """Put a model together in memory. `dtype` None: that of a GPU's usual half precision, float32 on a CPU.

    Raises UnsupportedError (exit 4) for families that transformers has no class of, UsageError for a device that is
    missing; what `assemble` and reading raise.
    """
    import torch

    quiet_bitsandbytes()
    place = _device(device)
    kind = dtype or ("float32" if place.type == "cpu" else _half(model))
    words, facts = Words.of(made), model.facts
    config = made.preprocessor_config(for_hf=False)
    assert config is not None  # `assemble` was asked for the tower's config
    eyes = Eyes(config, model.checkpoint.settings.image_aspect_ratio)
    halves = _language_model(model, made, kind), _tower(model)
    weights = _weights(model, kind, say)
    llm, tower = halves
    _fill(llm, weights, f"{LLM}.")
    llm.tie_weights()
    prefix = (
        f"{VISION}." if any(name.startswith(_INNER) for name, _ in tower.named_parameters()) else f"{VISION}.{_INNER}"
    )
    _fill(tower, weights, prefix)
    projector = _projector(weights, str(value_of(facts, ACTIVATION)))
    if four_bit:
        _quantise(llm)
    for part in (llm, tower, projector):
        part.to(place).eval()
    settings = model.checkpoint.settings
    return TransformersRuntime(
        llm, tower, projector, words, eyes, settings.select_layer, int(settings.select_strategy == "default"), place,
        getattr(torch, kind),
    )  # fmt: skip


def _device(word: str | None) -> Any:
    import torch

    if word == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here", hint="--device cpu computes without one")
    if word is not None:
        return torch.device(word)
    return torch.device("cuda", _local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def _local_rank() -> int:
    """Which of this machine's processes it is, as accelerate and torchrun tell."""
    import os

    return int(os.environ.get("LOCAL_RANK", "0"))


def _half(model: Model) -> str:
    stated = str(model.configs[LLM].get("torch_dtype"))
    return stated if stated in ("float16", "bfloat16") else "float16"


def _weights(model: Model, dtype: str, say: Reporter) -> dict[str, Any]:
    """Every tensor by its canonical name."""
    import torch

    to = FROM_TORCH_NAMES[dtype]
    outputs = tuple(Output(name, name, recipe, to) for name, recipe in model.recipes.items())
    plan = make_plan(Target("memory", (FileSet(outputs, limit=None),), {}))
    total = sum(t.nbytes for t in plan.tensors)
    with FilePool() as pool:
        found = in_memory(plan, pool, progress=say.start("loading", total))
    kind = getattr(torch, dtype)
    return {t.name: torch.frombuffer(found[t.name], dtype=kind).view(t.shape) for t in plan.tensors}


@contextmanager
def _empty() -> Iterator[None]:
    """Modules without weights: their parameters take no memory, their buffers are as their classes make them."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


def _language_model(model: Model, made: Artefacts, dtype: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = made.text_config(dtype, rows=model.recipes[model.embedding].shape[0])
    known = {
        k: v for k, v in config.items() if k not in ("model_type", "architectures", "torch_dtype", "_name_or_path")
    }
    try:
        settings = AutoConfig.for_model(config["model_type"], **known)
    except ValueError:
        name = family(LLM, config).name
        raise UnsupportedError(
            f"transformers has no class for {name}", hint="convert it with --as llama, where its table has that"
        ) from None
    with _empty():
        return AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, dtype))


def _tower(model: Model) -> Any:
    import transformers

    config = model.configs[VISION]
    cls = getattr(transformers, _TOWERS[config["model_type"]])
    known = {
        k: v for k, v in config.items() if k not in ("model_type", "architectures", "torch_dtype", "_name_or_path")
    }
    with _empty():
        return cls(cls.config_class(**known))


def _projector(weights: Mapping[str, Any], activation: str) -> Any:
    """Linear layers with the activation between them, of the tensors `projector.0`, `projector.2`, …"""
    from torch import nn
    from transformers.activations import ACT2FN

    layers: list[Any] = []
    with _empty():
        for name in sorted((n for n in weights if n.startswith(PROJECTOR) and n.endswith(".weight")), key=_number):
            if layers:
                layers.append(ACT2FN[activation])
            wide_out, wide_in = weights[name].shape
            layers.append(nn.Linear(wide_in, wide_out, bias=name.replace(".weight", ".bias") in weights))
        made = nn.Sequential(*layers)
    _fill(made, weights, f"{PROJECTOR}.")
    return made


def _number(name: str) -> int:
    return int(name.split(".")[1])


def _fill(module: Any, weights: Mapping[str, Any], prefix: str) -> None:
    """Give a module its weights. Raises UnsupportedError where transformers' class wants others."""
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    report = module.load_state_dict(own, strict=False, assign=True)
    tied = (
        {name for name in report.missing_keys if getattr(module.config, "tie_word_embeddings", False)}
        if hasattr(module, "config")
        else set()
    )
    missing = [name for name in report.missing_keys if name not in tied and not name.endswith("position_ids")]
    unexpected = [name for name in report.unexpected_keys if not name.endswith("position_ids")]
    if missing or unexpected:
        raise UnsupportedError(
            f"transformers' {type(module).__name__} is another one than the table's: it misses {missing[:3]}, and has "
            f"no place for {unexpected[:3]}",
            hint="convert it, and ask it with the program of that layout",
        )


def _quantise(llm: Any) -> None:
    """Linear layers in NF4 with double quantisation, the head aside, as xtuner's `--bits 4` does."""
    import logging

    import torch

    # On some CPUs it asks for one package more, and does without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise UsageError(
            "--4bit needs bitsandbytes, which is not installed", hint="pip install 'llava-convert[qlora]'"
        ) from None
    head = llm.get_output_embeddings()
    for parent in list(llm.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not torch.nn.Linear or child is head:
                continue
            small = bnb.nn.Linear4bit(
                child.in_features, child.out_features, bias=child.bias is not None, quant_type="nf4",
                compress_statistics=True, compute_dtype=child.weight.dtype, device="meta",
            )  # fmt: skip
            small.weight = bnb.nn.Params4bit(
                child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            small.bias = child.bias
            setattr(parent, name, small)


def _streamer(tokenizer: Any, stream: Stream) -> Any:
    from transformers import TextStreamer

    class Pieces(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            stream(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
