"""LoRA adapters: which tensors belong to which module, and by what factor they count.

The arithmetic is `ops.lora.MergeLora`. Facts on names and factors come from peft 0.12, which xtuner trains with: scale
is alpha / r, with rsLoRA alpha / sqrt(r); `rank_pattern` and `alpha_pattern` map a regular expression on the end of a
module's path to its own r or alpha.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.tensors import StoredTensor
from llava_convert.core.values import dataclass
from llava_convert.model.tables.names import DISK, grouped, layout_table
from llava_convert.model.training import LoraSettings
from llava_convert.ops.lora import MergeLora
from llava_convert.ops.rows import SetRows

_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
_TAILS = (_A, _B, _MAGNITUDE, _EMBEDDING_A, _EMBEDDING_B)
_TOKENS = ".token_adapter.trainable_tokens_delta"
_SAVED, _FROZEN = "modules_to_save", "original_module"
_FROZEN_WHY = "the frozen copy that peft keeps of a module which was trained whole"


@dataclass(frozen=True, slots=True)
class LoraModule:
    """The adapter of one layer: `a` is (r, in), `b` is (out, r), `magnitude` (DoRA) is (out,).

    Of an `embedding` of (rows, columns), `a` is (r, rows) and `b` is (columns, r).
    """

    a: StoredTensor
    b: StoredTensor
    magnitude: StoredTensor | None
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """The LoRA of one part.

    `modules` is by canonical module name; `overrides` are tensors which were trained whole beside it (biases,
    modules_to_save), by the canonical name of the tensor they replace; `tensors` is everything, named
    as an adapter_model file names it, less the `base_model.model.` in front.

    `tokens` are rows of embeddings that were trained alone, by the canonical name of the embedding. `paths` are the
    modules' names in the model that peft wrapped, where these are not those within the part: patterns are of them.
    """

    settings: LoraSettings | None
    modules: Mapping[str, LoraModule]
    overrides: Mapping[str, StoredTensor]
    tensors: Mapping[str, StoredTensor]
    tokens: Mapping[str, SetRows] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether it changes nothing."""
        return not (self.modules or self.overrides or self.tokens)

    def merge_op(self, tensor: str, alpha: float | None = None) -> MergeLora | None:
        """The op which merges the adapter into the weight `tensor`, or None when it does not touch it.

        `alpha` overrides what the settings say. Raises UnsupportedError (exit 4) when neither knows it.
        """
        module = self.modules.get(tensor.removesuffix(".weight")) if tensor.endswith(".weight") else None
        if module is None:
            return None
        return MergeLora(
            module.a,
            module.b,
            self.scale(tensor.removesuffix(".weight"), alpha=alpha),
            magnitude=module.magnitude,
            embedding=module.embedding,
        )

    def scale(self, module: str, *, alpha: float | None = None) -> float:
        """The factor of B·A for one module (canonical name)."""
        rank = self.modules[module].rank
        settings = self.settings
        if settings is not None:
            expected, known = settings_for(settings, self.path(module))
            if expected != rank:
                raise InputError(f"LoRA of {module}: the config says r = {expected}, the weights have r = {rank}")
            alpha = known if alpha is None else alpha
        if alpha is None or math.isnan(alpha):
            raise UnsupportedError(
                f"the alpha of the LoRA (rank {rank}) is not known: neither a config nor an adapter_config.json has it",
                hint="give the training config by --config, or the value by --lora-alpha",
            )
        return alpha / (math.sqrt(rank) if settings is not None and settings.use_rslora else rank)

    def path(self, module: str) -> str:
        """What the model that peft wrapped calls a module (canonical name)."""
        return self.paths.get(module, module.partition(".")[2])


def split_tail(name: str) -> tuple[str, str]:
    """The name of a tensor as if peft were not there, and peft's own tail (empty for a tensor that is whole).

    >>> split_tail("layers.0.q_proj.lora_A.default.weight")
    ('layers.0.q_proj.weight', '.lora_A.default.weight')
    """
    segments = name.split(".")
    for marker in (_SAVED, _FROZEN):
        if marker in segments[:-2]:  # a container: what it holds follows, in peft's live names after the adapter's
            at = segments.index(marker)
            rest = segments[at + 2 :] if marker == _SAVED and segments[at + 1] == "default" else segments[at + 1 :]
            return ".".join(segments[:at] + rest), f".{marker}"
    for row in layout_table("peft").candidates(name, DISK):
        found = row.disk.match(name)
        if found is not None:
            (module,) = found.values()
            tail = name.removeprefix(module)
            return module + (".bias" if tail.endswith(".bias") else ".weight"), tail
    return name, ""


def with_tail(canonical: str, tail: str) -> str:
    """The canonical name of a tensor under peft, of its name without and its tail (`split_tail`)."""
    if tail in ("", f".{_SAVED}"):
        return canonical
    if tail == f".{_FROZEN}":
        module, _, param = canonical.rpartition(".")
        return f"{module}{tail}.{param}"
    return canonical.rpartition(".")[0] + tail


def parse_adapter(
    named: Mapping[str, StoredTensor],
    settings: LoraSettings | None,
    where: str,
    paths: Mapping[str, str] | None = None,
) -> tuple[Adapter, dict[str, str]]:
    """Sort a part's tensors under peft (canonical prefix, peft's own tails) into an Adapter.

    `paths` are the modules' names where they were trained, by canonical name (see `Adapter`). Also returns what is left
    behind: name → reason. Raises InputError for half an adapter, UnsupportedError for other kinds of adapter.
    """
    _check_kind(settings, where)
    table = layout_table("peft")
    sides: dict[str, dict[str, StoredTensor]] = {}
    overrides: dict[str, StoredTensor] = {}
    tokens: dict[str, SetRows] = {}
    saved: dict[str, StoredTensor] = {}
    dropped: dict[str, str] = {}
    meant: dict[str, str] = {}
    for name, tensor in named.items():
        reason = table.dropped(name)
        if reason is not None:
            dropped[name] = reason
            continue
        meaning = table.read(name)
        canonical = _unwrapped(name if meaning is None else meaning.canonical)
        tail = next((t for t in _TAILS if canonical.endswith(t)), None)
        if tail is not None:
            sides.setdefault(canonical.removesuffix(tail), {})[tail] = tensor
            whole = canonical
        elif canonical.endswith(_TOKENS):
            whole = canonical
            module = canonical.removesuffix(_TOKENS)
            tokens[f"{module}.weight"] = _trained_rows(settings, (paths or {}).get(module, module), tensor, where)
        elif ".lora_" in canonical:
            raise UnsupportedError(f"{where}: {grouped([name])} is a kind of adapter that cannot be merged")
        else:
            canonical = canonical.replace(".modules_to_save.", ".")
            whole = canonical.replace(".base_layer.", ".")
            overrides[whole] = tensor
        if whole in meant:
            raise InputError(f"{where}: {meant[whole]} and {name} are both {whole}")
        meant[whole] = name
        saved[canonical] = tensor
    modules = {}
    for module, tensors in sides.items():
        embedding = _EMBEDDING_A in tensors or _EMBEDDING_B in tensors
        pair = (_EMBEDDING_A, _EMBEDDING_B) if embedding else (_A, _B)
        if not tensors.keys() >= set(pair) or (embedding and len(tensors) > 2 and _MAGNITUDE not in tensors):
            raise InputError(f"{where}: the LoRA of {module} has only {', '.join(sorted(tensors))}")
        a, b = (tensors[tail] for tail in pair)
        if embedding and _MAGNITUDE in tensors:
            raise UnsupportedError(
                f"{where}: the LoRA of {module} is DoRA on an embedding, which cannot be merged",
                hint="merge it with peft (merge_and_unload), and convert what that saves",
            )
        if not a.shape or len(b.shape) < 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
            raise InputError(f"{where}: LoRA of {module}: A is {list(a.shape)} and B is {list(b.shape)}")
        if settings is not None and settings.use_dora and _MAGNITUDE not in tensors:
            raise InputError(f"{where}: the LoRA of {module} is DoRA by its config, but its magnitude is missing")
        modules[module] = LoraModule(a, b, tensors.get(_MAGNITUDE), embedding)
    return Adapter(settings, modules, overrides, saved, tokens, paths or {}), dropped


def _trained_rows(settings: LoraSettings | None, path: str, values: StoredTensor, where: str) -> SetRows:
    """The rows that were trained alone. Raises InputError where adapter_config.json does not say which they are."""
    indices = settings.token_indices if settings is not None else ()
    if isinstance(indices, Mapping):
        ends = (rows for name, rows in indices.items() if path == name or path.endswith(f".{name}"))
        indices = next(ends, ())
    if len(indices) != (values.shape[0] if values.shape else 0):
        raise InputError(
            f"{where}: {path} has {values.shape[0] if values.shape else 0} trained rows, but trainable_token_indices "
            f"of adapter_config.json lists {len(indices)}",
            hint="get adapter_config.json and adapter_model from the same save",
        )
    return SetRows(indices, values)


def _unwrapped(name: str) -> str:
    """The name less a second `base_model.model.`, which peft leaves of a model that it wrapped twice."""
    part, _, rest = name.partition(".")
    while rest.startswith("base_model.model."):
        rest = rest.removeprefix("base_model.model.")
    return f"{part}.{rest}"


def _check_kind(settings: LoraSettings | None, where: str) -> None:
    if settings is None:
        return
    if settings.peft_type and settings.peft_type.upper() != "LORA":
        raise UnsupportedError(f"{where}: an adapter of type {settings.peft_type} cannot be merged, only LORA")
    if settings.fan_in_fan_out:
        raise UnsupportedError(f"{where}: fan_in_fan_out adapters cannot be merged")
    if isinstance(settings.init_lora_weights, str) and settings.init_lora_weights.lower().startswith("pissa"):
        raise UnsupportedError(
            f"{where}: a PiSSA-initialised adapter changes its base model and cannot be merged into the published one"
        )


def settings_for(settings: LoraSettings, path: str) -> tuple[int, float]:
    """r and alpha of one module, by its path in the model that peft wrapped; peft 0.12 looks up one key for both.

    The first key that matches the end of the module's path counts, those of rank_pattern before those of
    alpha_pattern. So a module which a rank key and another alpha key match keeps the common alpha; later versions of
    peft look the two up apart.
    """
    if settings.patterns_apart:
        rank = next((v for k, v in settings.rank_pattern.items() if _safe_regex(k).fullmatch(path)), settings.r)
        return rank, _own_alpha(settings, path)
    keys = (*settings.rank_pattern, *settings.alpha_pattern)
    key = next((k for k in keys if _safe_regex(k).fullmatch(path)), path)
    return settings.rank_pattern.get(key, settings.r), settings.alpha_pattern.get(key, settings.lora_alpha)


def _own_alpha(settings: LoraSettings, path: str) -> float:
    """alpha as later versions of peft look it up: by a key of its own."""
    return next((v for k, v in settings.alpha_pattern.items() if _safe_regex(k).fullmatch(path)), settings.lora_alpha)


def disputed(adapter: Adapter) -> list[str]:
    """Modules whose alpha depends on the version of peft: a rank key and another alpha key match them."""
    settings = adapter.settings
    if settings is None or settings.patterns_apart or not settings.rank_pattern or not settings.alpha_pattern:
        return []
    found = []
    for module in adapter.modules:
        path = adapter.path(module)
        if _own_alpha(settings, path) != settings_for(settings, path)[1]:
            found.append(module)
    return found


def _safe_regex(key: str) -> re.Pattern[str]:
    """peft's own form of a pattern key. A key that could take for ever to match is refused."""
    quantifiers = len(re.findall(r"[*+{?]", key))
    if len(key) > 200 or quantifiers > 2 or re.search(r"\)[*+{?]", key):
        raise UnsupportedError(f"rank_pattern or alpha_pattern key {key[:60]!r} is too complex to be matched safely")
    try:
        return re.compile(rf"(.*\.)?({key})")
    except re.error as problem:
        raise InputError(f"rank_pattern or alpha_pattern: {key!r} is not a regular expression: {problem}") from problem


def settings_from_json(raw: Mapping[str, Any], path: Path) -> LoraSettings:
    """What an adapter_config.json says.

    Raises InputError when r is missing or no count, UnsupportedError for other kinds of adapter and for r = 0.
    """
    kind = str(raw.get("peft_type") or "LORA")
    if kind.upper() != "LORA":  # before r, which other kinds may not have
        raise UnsupportedError(f"{path}: an adapter of type {kind} cannot be merged, only LORA")
    rank = raw.get("r")
    if rank == 0 and rank is not False:
        raise UnsupportedError(f"{path}: r = 0 adapts nothing", hint="use the base model as it is")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"{path}: r should be a count, found {rank!r}")
    alpha = raw.get("lora_alpha")
    return LoraSettings(
        r=rank,
        lora_alpha=alpha if isinstance(alpha, int | float) else math.nan,
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
        bias=str(raw.get("bias") or "none"),
        rank_pattern=_pattern(raw, "rank_pattern", path),
        alpha_pattern=_pattern(raw, "alpha_pattern", path),
        target_modules=_names(raw.get("target_modules")),
        modules_to_save=_names(raw.get("modules_to_save")),  # type: ignore[arg-type]
        fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
        init_lora_weights=raw.get("init_lora_weights", True),
        peft_type=kind,
        token_indices=_token_indices(raw, path),
        # Since 0.14 (huggingface/peft#2195), whose configs are the first with this key.
        patterns_apart="lora_bias" in raw,
    )


def _token_indices(raw: Mapping[str, Any], path: Path) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """The rows that were trained alone: a list of them, or one for each module. Raises InputError for anything else."""
    found = raw.get("trainable_token_indices") or ()
    lists = found.values() if isinstance(found, dict) else [found]
    if not all(isinstance(one, list | tuple) and all(type(row) is int and row >= 0 for row in one) for one in lists):
        raise InputError(f"{path}: trainable_token_indices should be the ids of tokens, found {str(found)[:60]!r}")
    return {name: tuple(one) for name, one in found.items()} if isinstance(found, dict) else tuple(found)


def _pattern(raw: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    found = raw.get(key) or {}
    if not isinstance(found, dict) or not all(type(value) in (int, float) for value in found.values()):
        raise InputError(f"{path}: {key} should give a number to each name, found {str(found)[:60]!r}")
    return found


def _names(value: Any) -> tuple[str, ...] | str | None:
    return tuple(map(str, value)) if isinstance(value, list) else value
