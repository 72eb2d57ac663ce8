"""Everything that is known of a layout without opening a file: its names, its options, its words, its defaults.

Data alone. A module outside of `layouts/` that has to tell layouts apart asks here, by what it needs to know, and
names none. To add a layout, add a `LayoutInfo` to LAYOUTS: what has no default has no answer that is right for most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace

from llava_convert.core.errors import UsageError
from llava_convert.core.text import did_you_mean
from llava_convert.core.values import dataclass


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the README.md of an output says of its kind, and the hub by its front matter.

    `quickstarts` are texts of `app/card/texts`, each on how a program uses the output, in order; one that does not fit
    an output is left out (`app/card/quickstarts.py`). `library` is the hub's `library_name`, by which it offers code,
    and `task` its `pipeline_tag`. `next` is what to try first, with the words of the texts; None: `verify`. `next_in`
    is that of a program that `--to` named.
    """

    sentence: str
    library: str
    quickstarts: tuple[str, ...]
    task: str = "image-text-to-text"
    next: str | None = None
    next_in: Mapping[str, str] = field(default_factory=dict)


_IN_VLLM = {"vllm": "vllm serve <<model_sh>><<vllm_template_sh>>"}
_IN_OLLAMA = {"ollama": "ollama create <<ollama_sh>> -f <<modelfile_sh>> && ollama run <<ollama_sh>>"}

# A language model or a vision tower alone is a folder that transformers reads, whichever layout it was made for.
_LANGUAGE_MODEL = Card(
    sentence="This is the language model of a LLaVA, on its own: it reads text, and cannot see pictures.",
    library="transformers",
    quickstarts=("language_model", "language_model_vllm", "llm_adapter"),
    task="text-generation",
    next="from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(<<model_py>>)",
    next_in={"vllm": "vllm serve <<model_sh>>"},
)
_VISION_TOWER = Card(
    sentence="This is the vision tower of a LLaVA, on its own.",
    library="transformers",
    quickstarts=("vision_tower", "tower_adapter"),
    task="image-feature-extraction",
)
_ADAPTER = Card(
    sentence="This is a LoRA adapter of a LLaVA, for peft. Load it onto the model that it was trained on.",
    library="peft",
    quickstarts=("peft",),
)
_PROJECTOR = "This is the projector of a LLaVA, on its own: the layers between vision tower and language model."


_PTH = Card(
    sentence="This is a LLaVA as a training checkpoint of xtuner (mmengine's `.pth`). A training can start from it.",
    library="xtuner",
    quickstarts=("xtuner_pth",),
)


@dataclass(frozen=True, kw_only=True)
class TargetInfo:
    """A layout as what a conversion writes.

    `options` are those that shape its output. Of the cards, `whole` is that of a LLaVA, the
    others of a part alone; `projector` is None where a projector alone is not written. `tags` are the hub's.

    `shard_size` is where shards end when the source has none to follow. `repo_suffix` follows a release's name in the
    repository's, and in the names of card and files unless `plain_names`. `pads_pictures`: its readers pad pictures to
    squares by themselves, as training does. `by_file`: they are given a file, not the folder. `adapters_alone`: it
    holds adapters, onto which no base is laid. `chat_template` tells where the chat template is. `by_training`: it is
    for who trains on, so that a release leaves it out.
    """

    options: frozenset[str]
    whole: Card
    projector: Card | None
    repo_suffix: str
    language_model: Card = _LANGUAGE_MODEL
    vision_tower: Card = _VISION_TOWER
    tags: tuple[str, ...] = ()
    shard_size: str = "2GB"
    plain_names: bool = False
    pads_pictures: bool = True
    by_file: bool = False
    by_training: bool = False
    adapters_alone: bool = False
    chat_template: str = "the tokenizer's files"


@dataclass(frozen=True)
class Form:
    """One form that a source may have, in words, and the layouts that it can never become."""

    text: str
    never: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayoutInfo:
    """One layout. `loaders` are programs that read it: their names stand for it, too. `forms` are what is read as it.

    `help` is a sentence for the command of its name, `description` what cards call a source of it. `target` is None for
    a layout that is not written.

    `reads` are the options that help to read it and not every layout. `trainer` is the program whose training leaves
    it. `has_shards`: its weights lie in shards that an output can follow. `has_card`: a README.md beside it is the
    model's own.

    `leaves_out_frozen`: what training left as it was is not in it, so that a base is of no use to an output, and a
    projector alone is all that a pretraining leaves.
    """

    name: str
    help: str
    description: str
    target: TargetInfo | None
    forms: tuple[Form, ...]
    loaders: tuple[str, ...] = ()
    reads: frozenset[str] = frozenset()
    trainer: str | None = None
    has_shards: bool = True
    has_card: bool = True
    leaves_out_frozen: bool = False

    @property
    def writes(self) -> frozenset[str]:
        """The options that shape its output, none for a layout that is not written."""
        return self.target.options if self.target is not None else frozenset()


_TRAINED = frozenset({"config", "pretrained_pth"})  # of xtuner's training
_TALK = frozenset({"prompt_template", "chat_template", "stop"})  # how a model is prompted, and where it stops
_WEIGHTS = frozenset({"dtype", "max_shard_size"}) | _TALK
LAYOUTS = {
    info.name: info
    for info in (
        LayoutInfo(
            name="pth",
            forms=(Form("`iter_N.pth` of xtuner's training"), Form("its DeepSpeed folder, ZeRO 1 to 3")),
            help="A .pth checkpoint of xtuner's training (mmengine).",
            description="a training checkpoint of xtuner (`.pth`)",
            reads=_TRAINED,
            trainer="xtuner",
            has_shards=False,
            has_card=False,  # its folder is a training's, whose README is about something else
            leaves_out_frozen=True,
            target=TargetInfo(
                options=frozenset({"dtype", "prompt_template"}),
                whole=_PTH,
                projector=_PTH,
                language_model=replace(_LANGUAGE_MODEL, library="xtuner", quickstarts=("xtuner_pth",), next=None),
                vision_tower=replace(_VISION_TOWER, library="xtuner", quickstarts=("xtuner_pth",)),
                repo_suffix="-pth",
                tags=("xtuner",),
                by_training=True,
                chat_template="the training config within it, by xtuner's name",
            ),
        ),
        LayoutInfo(
            name="xtuner",
            forms=(Form("LLM or `llm_adapter/`, `projector/`, `visual_encoder…/`"),),
            help="A folder in xtuner's layout: LLM, projector/, visual_encoder_adapter/.",
            description="xtuner's layout",
            reads=_TRAINED,
            trainer="xtuner",
            leaves_out_frozen=True,
            target=TargetInfo(
                options=_WEIGHTS,
                # The hub has no snippet for "xtuner" nor for "llava", and that is right: with "transformers", or
                # nothing, it would offer one that fails.
                whole=Card(
                    sentence="This is a LLaVA in xtuner's layout: a model that answers questions about pictures.",
                    library="xtuner",
                    quickstarts=("xtuner",),
                ),
                projector=Card(
                    sentence="This is the projector of a LLaVA in xtuner's layout, the result of a pretraining. "
                    "Use it with the language model and the vision tower that it was trained with.",
                    library="xtuner",
                    quickstarts=("xtuner",),
                ),
                repo_suffix="",
                tags=("xtuner",),
            ),
        ),
        LayoutInfo(
            name="official",
            forms=(
                Form("haotian-liu's LLaVA and its forks", never=("peft",)),
                Form("its LoRA form; `mm_projector.bin`"),
            ),
            loaders=("llava",),
            reads=frozenset({"dequantize", "config_from"}),
            help="A model of the LLaVA code base (haotian-liu).",
            description="the layout of the original LLaVA code",
            target=TargetInfo(
                options=_WEIGHTS | {"image_processor"},
                whole=Card(
                    sentence="This is a LLaVA in the layout of the original code (haotian-liu/LLaVA): a model that "
                    "answers questions about pictures.",
                    library="llava",
                    quickstarts=("llava", "llava_forks", "lmdeploy_official", "sglang_official"),
                ),
                projector=Card(sentence=_PROJECTOR, library="llava", quickstarts=("projector_llava",)),
                repo_suffix="-hf",  # as xtuner names its releases
            ),
        ),
        LayoutInfo(
            name="hf",
            forms=(
                Form("LLaVA, all key dialects; MLX's, not quantised", never=("peft",)),
                Form("LLaVA-NeXT and LLaVA-OneVision", never=("pth", "xtuner", "peft", "gguf")),
                Form("`torch.distributed.checkpoint`, FSDP, verl, DeepSpeed under HF's Trainer", never=("peft",)),
                Form("a state dict alone, with `--config-from`", never=("peft",)),
                Form("a language model alone", never=("peft",)),
                Form("a vision tower or a projector alone", never=("peft", "gguf")),  # an mmproj holds both
            ),
            loaders=("transformers", "vllm"),
            reads=frozenset({"dequantize", "config_from"}),
            help="A LLaVA, LLaVA-NeXT or LLaVA-OneVision of transformers.",
            description="the transformers layout",
            target=TargetInfo(
                options=_WEIGHTS | {"image_processor"},
                whole=Card(
                    sentence="This is a LLaVA for transformers (`<<llava_class>>`): a model that answers "
                    "questions about pictures.",
                    library="transformers",
                    quickstarts=("transformers", "vllm", "lmdeploy", "sglang"),
                    next="from transformers import AutoModelForImageTextToText; "
                    "AutoModelForImageTextToText.from_pretrained(<<model_py>>)",
                    next_in=_IN_VLLM,
                ),
                projector=Card(sentence=_PROJECTOR, library="transformers", quickstarts=("projector",)),
                repo_suffix="-transformers",
                shard_size="5GB",
                pads_pictures=False,
            ),
        ),
        LayoutInfo(
            name="peft",
            forms=(
                Form("adapters of the LLM, the projector, the tower or all, of any release"),
                Form("a folder of HF's Trainer: the best checkpoint, or the newest"),
            ),
            help="A PEFT adapter (adapter_config.json) of a LLaVA.",
            description="a PEFT adapter",
            target=TargetInfo(
                options=frozenset({"dtype"}),
                whole=_ADAPTER,
                language_model=_ADAPTER,
                vision_tower=_ADAPTER,
                projector=_ADAPTER,
                repo_suffix="-peft",
                adapters_alone=True,
            ),
            has_card=False,  # a trainer's README says nothing of the model
        ),
        LayoutInfo(
            name="gguf",
            forms=(
                Form("language model, with or without `mmproj`", never=("peft",)),
                Form("a model in the stores of Ollama and LM Studio", never=("peft",)),
            ),
            loaders=("llama.cpp", "ollama"),
            reads=frozenset({"dequantize", "mmproj"}),
            help="GGUF files of llama.cpp: a language model, with or without its mmproj.",
            description="GGUF",
            has_shards=False,
            target=TargetInfo(
                options=frozenset({"outtype", "mmproj_outtype", "mmproj_for", "pre", "max_shard_size"}) | _TALK,
                whole=Card(
                    sentence="This is a LLaVA as GGUF, for llama.cpp and Ollama: a model that answers questions about "
                    "pictures. It has two files: the language model, and an mmproj with vision tower and projector.",
                    library="gguf",
                    quickstarts=("llama_cpp", "ollama"),
                    next="llama-server -m <<llm_sh>> --mmproj <<mmproj_sh>>",
                    next_in=_IN_OLLAMA,
                ),
                language_model=replace(
                    _LANGUAGE_MODEL,
                    library="gguf",
                    quickstarts=("llama_cpp_text", "ollama_text"),
                    next="llama-server -m <<llm_sh>>",
                    next_in=_IN_OLLAMA,
                ),
                vision_tower=replace(
                    _VISION_TOWER,
                    sentence="This is the mmproj of a LLaVA, on its own: its vision tower and projector as GGUF, for "
                    "llama.cpp.",
                    library="gguf",
                    quickstarts=("llama_cpp_mmproj",),
                ),
                projector=None,
                repo_suffix="-gguf",
                tags=("gguf", "llama.cpp", "ollama"),
                plain_names=True,  # a type follows the name of each file
                by_file=True,
                chat_template="the GGUF's metadata (`tokenizer.chat_template`)",
            ),
        ),
    )
}
TARGETS = {info.name: info.target for info in LAYOUTS.values() if info.target is not None}

# What a merged adapter becomes unless told.
MERGED = "hf"


def reading(option: str) -> tuple[str, ...]:
    """The layouts whose sources an option helps to read; none for an option that is for every source, or for none."""
    return tuple(info.name for info in LAYOUTS.values() if option in info.reads)


def writing(option: str) -> tuple[str, ...]:
    """The layouts whose output an option shapes; none for an option that is for every output, or for none."""
    return tuple(name for name, target in TARGETS.items() if option in target.options)


def layout_named(word: str) -> LayoutInfo:
    """The layout of a name, in any case, or of a program that loads it. Raises UsageError."""
    wanted = word.strip().lower()
    for info in LAYOUTS.values():
        if wanted in (info.name, *info.loaders, *(name.replace(".", "") for name in info.loaders)):
            return info
    loaders = ", ".join(
        f"{' or '.join(info.loaders)} for {info.name}" for info in LAYOUTS.values() if info.target and info.loaders
    )
    near = did_you_mean(wanted, [*LAYOUTS, *(name for info in LAYOUTS.values() for name in info.loaders)])
    choices = f"--to takes {', '.join(TARGETS)} ({loaders})"
    raise UsageError(f"--to {word}: no layout has that name", hint=f"{near} {choices}" if near else choices)
