"""GGUF files as a target: a language model for each type, one mmproj or more, and a Modelfile for Ollama.

The runtime checks little of what it loads: it segfaults or computes other numbers in silence. So whatever it needs is
checked here before a byte is written.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from llava_convert.assets.bundle import Artefacts
from llava_convert.assets.tokenizer.files import Tokenizer, open_tokenizer
from llava_convert.core.errors import UnsupportedError, UsageError
from llava_convert.core.tensors import QUANTS
from llava_convert.core.values import dataclass
from llava_convert.layouts.base import Needs
from llava_convert.layouts.defaults import refuse_quantised
from llava_convert.layouts.gguf import limits, mixes, rope, stock
from llava_convert.layouts.gguf.mixes import OUTTYPES
from llava_convert.layouts.gguf.modelfile import modelfile
from llava_convert.layouts.gguf.names import metadata_of, missing, table_for_family
from llava_convert.layouts.gguf.token_flags import runtime_name, space_first, unsaid
from llava_convert.layouts.gguf.vocabulary import SPACE_FIRST, SPACE_PREFIX, tokenizer_metadata
from llava_convert.layouts.naming import llm_dtype
from llava_convert.model.checkpoint import LLM, PARTS, PROJECTOR, VISION, Checkpoint
from llava_convert.model.facts import words_of
from llava_convert.model.options import ALL, TargetOptions
from llava_convert.model.projector import projector_config
from llava_convert.model.recipe import Model, Recipe
from llava_convert.model.renaming import Renamed
from llava_convert.model.tables.facts import Word, stated_in
from llava_convert.model.target import KEEP, FileSet, Output, Target, parse_size, part_names
from llava_convert.ops import kernels
from llava_convert.ops.rows import constant
from llava_convert.storage.gguf.file import Typed
from llava_convert.storage.sidecars import made_sidecars

NAME = "gguf"
MMPROJ_TYPES = ("f16",)
_QUANTIZATION_VERSION = 2  # kernels.h: GGML_QNT_VERSION
# generation_config's settings and the keys that llama.cpp reads them from.
_SAMPLING = {
    "top_k": ("top_k", "i32"),
    "top_p": ("top_p", "f32"),
    "min_p": ("min_p", "f32"),
    "temperature": ("temp", "f32"),
    "repetition_penalty": ("penalty_repeat", "f32"),
}


def needs(checkpoint: Checkpoint, part: str) -> Needs:
    if part == PROJECTOR:
        raise UsageError(
            "--part projector does not apply to GGUF: the mmproj holds the projector together with the vision tower",
            hint="--part visual-encoder writes the mmproj alone",
        )
    if part == LLM:
        return Needs((LLM,), (LLM,), keep_added=True)
    if part == VISION:
        return Needs((VISION, PROJECTOR), (VISION,), keep_added=True)
    return Needs(PARTS, (LLM, VISION), keep_added=True)


def lower(model: Model, options: TargetOptions) -> Target:
    """The files of every type asked for.

    Raises UsageError for unknown types and where no kernel makes one (exit 2), UnsupportedError (exit 4) for what
    llama.cpp's LLaVA cannot express.
    """
    made = Artefacts(model, options)
    types, mmproj_types = _llm_types(model, options), _mmproj_types(model, options)
    sets: list[FileSet] = []
    files: dict[str, bytes] = {}
    warnings: list[str] = []
    name = options.name or "model"
    stem = f"{name}-mmproj-{options.mmproj_for}" if options.mmproj_for else f"{name}-mmproj"
    mmprojs = [f"{stem}-{kind.name}" for kind in mmproj_types] if options.part in (ALL, VISION) else []
    if options.part in (ALL, LLM):
        limit = _limit(options)
        language, metadata = _language_model(model, made, options)
        warnings += [*made.warnings(LLM), *limits.warnings(model.configs[LLM]), *unsaid(_tokenizer(model, made))]
        for kind in types:
            outputs = _typed(language, kind, model)
            one = FileSet(outputs, "", f"{name}-{kind.name}", limit, NAME, metadata | _file_type(kind))
            sets.append(one)
            files[f"{name}-{kind.name}.Modelfile"] = _modelfile(model, made, part_names(one), mmprojs)
    if mmprojs:
        if options.part == ALL:
            limits.refuse_pictures(table_for_family(str(model.configs[LLM]["model_type"])).architecture)
        tower, metadata = _mmproj(model, made, options)
        blocks = int(model.configs[VISION]["num_hidden_layers"])
        for stem, kind in zip(mmprojs, mmproj_types, strict=True):
            outputs = tuple(
                _output(
                    one,
                    kind,
                    lambda kind, one: mixes.mmproj_type(
                        kind, one.name, one.recipe.shape, layer=_layer(one.name), layers=blocks
                    ),
                )
                for one in tower
            )
            sets.append(FileSet(outputs, "", stem, None, NAME, metadata | _file_type(kind)))
            if not kind.kept and OUTTYPES[kind.name].base in QUANTS and kind.name != "q8_0":
                warnings.append(f"an mmproj of type {kind.name} sees clearly worse; q8_0 and above do not")
    changed = [o for one in sets for o in one.outputs if o.recipe.dtype != o.dtype]
    refuse_quantised({output.name: output.recipe for output in changed})
    for output in changed:
        if output.dtype in QUANTS:
            kernels.require(output.dtype)
    if again := sorted(
        {o.recipe.tensor.dtype for o in changed if o.dtype in QUANTS and o.recipe.tensor.dtype in QUANTS}
    ):
        warnings.append(
            f"quantised a second time: the error of {', '.join(again)} stays, and that of the new type comes on top; "
            "the model's f16, bf16 or f32 file gives a better one"
        )
    return Target(NAME, tuple(sets), files, warnings=tuple(warnings))


@dataclass(frozen=True)
class _Type:
    """The type of a file; `kept`: each tensor keeps its own, those of a GGUF source. `number` is llama.cpp's for it."""

    name: str
    number: int
    kept: bool = False


def _llm_types(model: Model, options: TargetOptions) -> tuple[_Type, ...]:
    """The file types of the language model: as asked, else a GGUF's own, bf16 for a bf16 source and f16 for others."""
    if options.outtypes and options.outtypes != ("auto",):
        return _named(options.outtypes, "--outtype")
    if (kept := _kept(model, LLM)) is not None:
        return (kept,)
    return _named(("bf16",) if LLM in model.configs and llm_dtype(model) == "BF16" else ("f16",), "--outtype")


def _mmproj_types(model: Model, options: TargetOptions) -> tuple[_Type, ...]:
    if options.mmproj_outtypes:
        return _named(options.mmproj_outtypes, "--mmproj-outtype")
    kept = _kept(model, VISION)
    return _named(MMPROJ_TYPES, "--mmproj-outtype") if kept is None else (kept,)


def _named(asked: tuple[str, ...], option: str) -> tuple[_Type, ...]:
    names = dict.fromkeys(mixes.outtype(name, option=option) for name in asked)
    return tuple(_Type(name, OUTTYPES[name].file_type) for name in names)


def _kept(model: Model, part: str) -> _Type | None:
    """The type of the source's own file of a part; None where it is no GGUF, or is made floats of."""
    metadata = model.checkpoint.stated.get(part)
    recipes = model.part(part).values()
    changed = any(recipe.tensor.dtype in QUANTS and recipe.dtype not in QUANTS for recipe in recipes)
    if model.checkpoint.layout != NAME or metadata is None or changed:
        return None
    number = metadata["general.file_type"].value if "general.file_type" in metadata else None
    name = next((name for name, outtype in OUTTYPES.items() if outtype.file_type == number), None)
    return _Type(name or "kept", number if isinstance(number, int) else 0, kept=True)


def _limit(options: TargetOptions) -> int | None:
    return None if options.max_shard_size in (None, KEEP) else parse_size(str(options.max_shard_size))


def _language_model(model: Model, made: Artefacts, options: TargetOptions) -> tuple[list[Renamed], dict[str, Typed]]:
    config = model.configs[LLM]
    table = table_for_family(str(config["model_type"]))
    shared = {model.head} if model.tied and limits.has_tied_heads(table.architecture) else set()
    recipes = {name: recipe for name, recipe in model.part(LLM).items() if name not in shared}
    rows = recipes[model.embedding].shape[0]
    config = {**config, "vocab_size": rows, "tie_word_embeddings": model.tied}
    found = table.written(recipes, config)
    lacking = missing(table, config, [one.name for one in found])
    if lacking:
        raise UnsupportedError(f"the language model lacks {lacking[0]}, which llama.cpp needs")
    for disk, values in rope.factor_tensors(table.architecture, config).items():
        tensor, ops = constant(disk, (len(values),), values)
        found.append(Renamed(disk, disk, Recipe(tensor, ops, "config")))
    tokenizer = _tokenizer(model, made)
    metadata = _general(table.architecture, "model", runtime_name(options.name or "model", tokenizer), found)
    for setting, (key, kind) in _SAMPLING.items():
        value = made.generation_config.get(setting)
        if isinstance(value, int | float) and not isinstance(value, bool):
            metadata[f"general.sampling.{key}"] = Typed(kind, value)
    metadata |= metadata_of(table, config)
    template = made.templates.tokenizer if made.template_name is not None else tokenizer.chat_template
    template = options.chat_template or template  # as it was given: llama.cpp makes strings of the parts of a message
    metadata |= tokenizer_metadata(
        tokenizer, rows, pre=options.pre, chat_template=template, stop_ids=_stop_ids(made), config=config
    )
    metadata |= {key: Typed(_word(key).type, value) for key, value in words_of(NAME, model.facts).items()}
    if space_first(tokenizer):
        metadata[SPACE_FIRST] = Typed("bool", True)
    stated = tokenizer.config.get("add_prefix_space")
    if table.architecture == "llama" and isinstance(stated, bool):
        metadata.setdefault(SPACE_PREFIX, Typed("bool", stated))  # of byte-level ones too, where nothing reads it
    return found, metadata


def _word(key: str) -> Word:
    return stated_in(NAME)[key].layouts[NAME]


def _tokenizer(model: Model, made: Artefacts) -> Tokenizer:
    """The source's tokenizer; less the added tokens where the rows for them have been taken off."""
    tokenizer = made.required_tokenizer()
    if model.added is None:
        return tokenizer
    files = made.tokenizer_files()
    return open_tokenizer(made_sidecars(tokenizer.where, lambda: files))


def _stop_ids(made: Artefacts) -> list[int]:
    found = made.generation_config.get("eos_token_id")
    return [i for i in (found if isinstance(found, list) else [found]) if isinstance(i, int)]


def _typed(language: list[Renamed], kind: _Type, model: Model) -> tuple[Output, ...]:
    config = model.configs[LLM]
    layers = int(config["num_hidden_layers"])
    return tuple(
        _output(
            one,
            kind,
            lambda kind, one: mixes.tensor_type(
                kind,
                one.name,
                one.recipe.shape,
                layer=_layer(one.name),
                layers=layers,
                config=config,
                tied=model.tied,
            ),
        )
        for one in language
    )


def _output(one: Renamed, kind: _Type, type_of: Callable[[str, Renamed], str]) -> Output:
    dtype = one.recipe.dtype if kind.kept else type_of(kind.name, one)
    return Output(one.name, one.old, one.recipe, dtype, one.members)


def _layer(disk: str) -> int:
    parts = disk.removeprefix("v.").split(".")
    return int(parts[1]) if parts[0] == "blk" else 0


def _mmproj(model: Model, made: Artefacts, options: TargetOptions) -> tuple[list[Renamed], dict[str, Typed]]:
    config = model.configs[VISION]
    table, projector = table_for_family(str(config["model_type"])), table_for_family("projector")
    recipes = model.part(PROJECTOR)
    sizes = projector_config({name: recipe.tensor for name, recipe in recipes.items()})
    settings = model.checkpoint.settings
    tower = table.written(model.part(VISION), config)
    found = [*projector.written(recipes, config), *(stock.rolled(tower, config) if options.mmproj_for else tower)]
    lacking = missing(table, config, [one.name for one in found])
    if lacking:
        raise UnsupportedError(f"the vision tower lacks {lacking[0]}, which llama.cpp needs")
    blocks = int(config["num_hidden_layers"])
    layer = settings.select_layer if settings.select_layer >= 0 else blocks + 1 + settings.select_layer
    picture = made.preprocessor_config(for_hf=False) or {}
    metadata = _general("clip", "mmproj", options.name or "model", None)
    metadata |= {
        "clip.has_vision_encoder": Typed("bool", True),
        "clip.has_text_encoder": Typed("bool", False),
        "clip.has_llava_projector": Typed("bool", True),
        "clip.projector_type": Typed("str", "mlp"),
        **metadata_of(table, config),
        "clip.vision.projection_dim": Typed("u32", int(sizes["text_hidden_size"])),
        "clip.vision.feature_layer": Typed("[i32]", (layer,)),
    }
    if options.mmproj_for:
        metadata[stock.KEY] = Typed("str", options.mmproj_for)
    for key in ("image_mean", "image_std"):
        metadata[f"clip.vision.{key}"] = Typed("[f32]", tuple(float(value) for value in picture[key]))
    return found, metadata


def _general(architecture: str, kind: str, name: str, counted: list[Renamed] | None) -> dict[str, Typed]:
    found = {
        "general.architecture": Typed("str", architecture),
        "general.type": Typed("str", kind),
        "general.name": Typed("str", name),
    }
    if counted is not None:
        found["general.size_label"] = Typed("str", size_label(sum(prod(one.recipe.shape) for one in counted)))
    return found


def size_label(parameters: int) -> str:
    """A count as GGUF's convention shortens it: at least two digits, "8.0B" and "148K"."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (0, "K")):
        if parameters > limit or unit == "K":
            scaled = parameters / (limit or 1e3)
            digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
            return f"{scaled:.{digits}f}{unit}"
    raise AssertionError("the last unit takes all")


def _file_type(kind: _Type) -> dict[str, Typed]:
    return {
        "general.file_type": Typed("u32", kind.number),
        "general.quantization_version": Typed("u32", _QUANTIZATION_VERSION),
    }


def _modelfile(model: Model, made: Artefacts, llm: list[str], mmprojs: list[str]) -> bytes:
    tokenizer = made.required_tokenizer()
    stops = set(_stop_ids(made))
    texts = {i: text for text, i in tokenizer.vocabulary.items() if i in stops}
    context = model.configs[LLM].get("max_position_embeddings")
    return modelfile(
        llm,
        f"{mmprojs[0]}.gguf" if mmprojs else None,
        template=made.template_name,
        tokenizer=tokenizer,
        stops=[texts[i] for i in _stop_ids(made) if i in texts],
        context=context if isinstance(context, int) else None,
        has_own=made.templates.tokenizer is not None,
    )
