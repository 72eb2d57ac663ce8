"""What an xtuner training config says about the checkpoint it made.

`TrainingConfig` holds the settings of `xtuner.model.LLaVAModel` (0.1.23) which a conversion needs, from a config file
or from the text in a checkpoint's `meta.cfg`; both give equal values. Nothing is resolved here: paths stay as written.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError, UnsafeError, UnsupportedError, os_reason, unreadable
from llava_convert.model.training import LoraSettings, Setting, TrainingConfig
from llava_convert.storage.pyconfig.evaluate import MAX_TEXT, Call, Dotted, Unknown, evaluate
from llava_convert.storage.pyconfig.values import CONFIG_HINT, PLAIN_HINT
from llava_convert.storage.remote.mounts import remote_of

# A config that may be missing is; anything else that the system says of it is an error.
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def load_training_config(path: Path) -> TrainingConfig:
    """Reads the config at `path`, and the base configs that it names, none of which is executed.

    Errors: those of `parse_training_config`; InputError when a file is missing or is not text; UnsafeError for a base
    config outside reach (an absolute path, or not a .py file).
    """
    folder = path.parent

    def load(relative: str) -> str | None:
        base = folder / relative
        if Path(relative).is_absolute() or base.suffix != ".py":
            raise UnsafeError(f"{path}: base config {relative} is not a relative path to a .py file")
        return _text(base, optional=True)

    return training_config(evaluate(_text(path) or "", filename=str(path), load=load), filename=str(path))


def parse_training_config(text: str, filename: str) -> TrainingConfig:
    """The same from text, such as `meta.cfg` (which never has base configs: mmengine writes them merged).

    Errors: InputError for a syntax error or a config without a model; UnsupportedError for another model than
    LLaVAModel or a setting that only code gives; UnsafeError as told in `evaluate`.
    """
    return training_config(evaluate(text, filename=filename), filename=filename)


def _text(path: Path, *, optional: bool = False) -> str | None:
    try:
        remote_of(path)  # which fetches it, where it lies elsewhere
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device would be read for ever
            raise InputError(f"{path}: not a file", hint=CONFIG_HINT)
        if status.st_size > 4 * MAX_TEXT:
            raise UnsafeError(f"{path}: too large for a config ({status.st_size:,} bytes)", hint=PLAIN_HINT)
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})", hint=CONFIG_HINT) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        missing = not isinstance(error, OSError) or error.errno in _MISSING
        if optional and missing:
            return None
        if missing:
            raise InputError(f"{path}: cannot be read: {os_reason(error)}", hint=CONFIG_HINT) from None
        raise unreadable(path, error) from error


def training_config(values: Mapping[str, Any], *, filename: str) -> TrainingConfig:
    """The settings within `values`, as `evaluate` gives them. Errors as in `parse_training_config`."""
    if values.get("model") is None:
        raise InputError(f"{filename}: the config has no `model`", hint=CONFIG_HINT)
    model = _Section(values["model"], "model", filename)
    model_type = model.dotted("type")
    if model_type is not None and model_type.rpartition(".")[2] == "SupervisedFinetune":
        raise UnsupportedError(
            f"{filename}: this config trains a language model alone ({model_type}), without a projector",
            hint="`xtuner convert pth_to_hf` converts it to a folder, which can be the base of a LLaVA (--llm)",
        )
    if model_type is None or model_type.rpartition(".")[2] != "LLaVAModel":
        raise UnsupportedError(
            f"{filename}: the model is {model_type or 'of no type'}; only xtuner's LLaVAModel can be converted",
            hint=CONFIG_HINT,
        )
    llm, tower = model.section("llm"), model.section("visual_encoder")
    unresolved: dict[str, str] = {}
    datasets = [_Section(dataset, "dataset", filename) for dataset in _datasets(values)]
    squares = {dataset.values.get("pad_image_to_square", False) is True for dataset in datasets}
    return TrainingConfig(
        llm=_path(llm, "pretrained_model_name_or_path", "llm", unresolved),
        visual_encoder=_path(tower, "pretrained_model_name_or_path", "visual_encoder", unresolved),
        freeze_llm=model.flag("freeze_llm", False),
        freeze_visual_encoder=model.flag("freeze_visual_encoder", False),
        llm_lora=_lora(model.section("llm_lora")),
        visual_encoder_lora=_lora(model.section("visual_encoder_lora")),
        pretrained_pth=_path(model, "pretrained_pth", "pretrained_pth", unresolved),
        prompt_template=_template(values, datasets, filename, unresolved),
        visual_select_layer=model.whole("visual_select_layer", -2),
        projector_depth=model.whole("projector_depth", 2),
        max_position_embeddings=model.whole_or_none("max_position_embeddings"),
        quantized_llm=any(llm.get(key) for key in ("quantization_config", "load_in_4bit", "load_in_8bit")),
        pad_image_to_square=squares.pop() if len(squares) == 1 else None,
        llm_dtype=_dtype(llm.values.get("torch_dtype")),
        data_paths=tuple(path for one in datasets if isinstance(path := one.values.get("data_path"), str)),
        unresolved=unresolved,
    )


class _Section:
    """A dict of settings, or a call that was kept as one, with the name it has in the config for messages."""

    def __init__(self, value: Any, name: str, filename: str) -> None:
        self.name, self.filename = name, filename
        if isinstance(value, Call):
            names = ("pretrained_model_name_or_path",) if value.dotted.endswith(".from_pretrained") else ()
            if len(value.args) > len(names):
                raise self.unsupported(value)
            value = {"type": value.dotted, **dict(zip(names, value.args, strict=False)), **value.kwargs}
        if not isinstance(value, Mapping | None):
            raise self.unsupported(value)
        self.values: Mapping[str, Any] = value or {}
        self.given = value is not None

    def unsupported(self, value: Any, key: str = "") -> UnsupportedError:
        name = f"{self.name}.{key}" if key else self.name
        return UnsupportedError(_explain(value, name, self.filename), hint=PLAIN_HINT)

    def get(self, key: str) -> Any:
        """The value; UnsupportedError for an unknown one, since a guess would convert silently wrong."""
        value = self.values.get(key)
        if isinstance(value, Unknown):
            raise self.unsupported(value, key)
        return value

    def section(self, key: str) -> _Section:
        return _Section(self.values.get(key), f"{self.name}.{key}", self.filename)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None or type(value) in (bool, int):
            return default if value is None else bool(value)
        raise self.unsupported(value, key)

    def whole_or_none(self, key: str) -> int | None:
        value = self.get(key)
        if value is None or type(value) is int:
            return value
        raise self.unsupported(value, key)

    def whole(self, key: str, default: int) -> int:
        value = self.whole_or_none(key)
        return default if value is None else value

    def number(self, key: str, default: float) -> float:
        value = self.get(key)
        if value is None or type(value) in (int, float):
            return default if value is None else value
        raise self.unsupported(value, key)

    def dotted(self, key: str) -> str | None:
        """A name that is imported in a config file and a string in a dumped one."""
        value = self.get(key)
        if value is None or isinstance(value, str | Dotted):
            return None if value is None else str(value)
        raise self.unsupported(value, key)

    def text(self, key: str, default: str) -> str:
        return _last(self.dotted(key)) or default  # peft's enumerations are spelled TaskType.CAUSAL_LM or as text

    def texts(self, key: str) -> tuple[str, ...] | None:
        value = self.get(key)
        parts = sorted(value, key=repr) if isinstance(value, set) else value
        if parts is None or (isinstance(parts, list | tuple) and all(isinstance(part, str) for part in parts)):
            return None if parts is None else tuple(parts)
        raise self.unsupported(value, key)

    def numbers(self, key: str) -> dict[str, Any]:
        value = self.get(key)
        entries = {} if value is None else value
        if isinstance(entries, dict) and all(
            isinstance(name, str) and type(number) in (int, float) for name, number in entries.items()
        ):
            return dict(entries)
        raise self.unsupported(value, key)


def _explain(value: Any, name: str, filename: str) -> str:
    match value:
        case Unknown(what=what, where=where):
            return f"{where}: {name} depends on {what}, and a config is not executed"
        case Call(dotted=dotted, where=where):
            return f"{where}: {name} comes from calling {dotted}, and a config is not executed"
        case Dotted(name=dotted):
            return f"{filename}: {name} is {dotted}, whose value is not in the config"
    shown = repr(value)[:60] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return f"{filename}: {name} has an unexpected value: {shown}"


def _last(dotted: str | None) -> str | None:
    return None if dotted is None else dotted.rpartition(".")[2]


def _path(section: _Section, key: str, setting: Setting, unresolved: dict[str, str]) -> str | None:
    value = section.values.get(key)
    if isinstance(value, Call):
        value = _downloaded(value)
    if isinstance(value, str) and "{{" in value:  # mmengine fills these in from the file's name or the environment
        value = Unknown(f"the placeholder {value[:60]}", section.filename)
    if value is None or isinstance(value, str):
        return value
    unresolved[setting] = _explain(value, f"{section.name}.{key}", section.filename)
    return None


def _downloaded(call: Call) -> Any:
    """The id within `snapshot_download(...)`, which both hubs have; the call itself when it says anything else."""
    key = {"modelscope": "model_id", "huggingface_hub": "repo_id"}.get(call.dotted.partition(".")[0])
    if key is None or _last(call.dotted) != "snapshot_download":
        return call
    name, revision = call.args[0] if call.args else call.kwargs.get(key), call.kwargs.get("revision")
    if len(call.args) > 1 or not isinstance(name, str) or not isinstance(revision, str | None):
        return call
    if key == "repo_id" and revision:  # a plain id has no place for it
        return call
    return name if key == "repo_id" else f"ms://{name}" + (f"@{revision}" if revision else "")


def _dtype(value: Any) -> str | None:
    """torch's name of a dtype; None for another value ("auto", or one that only code gives)."""
    name = _last(str(value)) if isinstance(value, str | Dotted) else None
    return name if name in ("float16", "bfloat16", "float32") else None


def _lora(section: _Section) -> LoraSettings | None:
    if not section.given:
        return None
    kind = section.dotted("type")
    if _last(kind) != "LoraConfig" or section.text("peft_type", "LORA").upper() != "LORA":
        found = kind or "of no type"
        raise UnsupportedError(f"{section.filename}: {section.name} is {found}; only LoRA (peft.LoraConfig) is known")
    targets = section.get("target_modules")
    initial = section.get("init_lora_weights")
    if not isinstance(initial, bool | str | None):
        raise section.unsupported(initial, "init_lora_weights")
    named = {"type", "task_type", *LoraSettings.__dataclass_fields__} - {"other"}
    return LoraSettings(
        r=section.whole("r", 8),
        lora_alpha=section.number("lora_alpha", 8),
        use_rslora=section.flag("use_rslora", False),
        use_dora=section.flag("use_dora", False),
        bias=section.text("bias", "none"),
        rank_pattern=section.numbers("rank_pattern"),
        alpha_pattern=section.numbers("alpha_pattern"),
        target_modules=targets if isinstance(targets, str) else section.texts("target_modules"),
        modules_to_save=section.texts("modules_to_save"),
        fan_in_fan_out=section.flag("fan_in_fan_out", False),
        init_lora_weights=True if initial is None else initial,
        other={key: value for key, value in section.values.items() if key not in named},
    )


def _datasets(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The training's datasets, those within a ConcatDataset or the like one by one."""
    loader = values.get("train_dataloader")
    first = loader.get("dataset") if isinstance(loader, Mapping) else None
    queue = [(first or values.get("train_dataset") or values.get("llava_dataset"), 0)]
    for visited, (dataset, depth) in enumerate(queue):
        if visited > 1000 or depth > 8:  # a config may make a list hold itself
            return
        if isinstance(dataset, list | tuple):
            queue.extend((part, depth + 1) for part in dataset[:1000])
        elif isinstance(dataset, Mapping):
            inner = [dataset[key] for key in ("datasets", "dataset") if key in dataset]
            queue.extend((part, depth + 1) for part in inner)
            if not inner:
                yield dataset


def _template(
    values: Mapping[str, Any], datasets: list[_Section], filename: str, unresolved: dict[str, str]
) -> str | Mapping[str, Any] | None:
    """The prompt template: the top-level name, which must agree with the datasets (theirs was trained with).

    They part where `--cfg-options prompt_template=...` changed the name only, or where datasets differ.
    """
    places = [("prompt_template", values.get("prompt_template"))]
    for dataset in datasets:
        function = dataset.values.get("template_map_fn")
        function = function.kwargs if isinstance(function, Call) else function
        if isinstance(function, Mapping):
            places.append(("template_map_fn.template", function.get("template")))
    found: list[str | Mapping[str, Any]] = []
    for name, value in places:
        template = _named_template(value)
        if template is None and value is not None:
            unresolved["prompt_template"] = _explain(value, name, filename)
            return None
        if template is not None and template not in found:
            found.append(template)
    if len(found) > 1:
        names = ", ".join(item if isinstance(item, str) else "a template written out" for item in found)
        unresolved["prompt_template"] = f"{filename}: more than one prompt template: {names}"
        return None
    return found[0] if found else None


def _named_template(value: Any) -> str | Mapping[str, Any] | None:
    if isinstance(value, str | Dotted):
        head, _, name = str(value).rpartition(".")
        known = _last(head) == "PROMPT_TEMPLATE" or (isinstance(value, str) and not head)
        return name if known and name.isidentifier() else None
    if isinstance(value, Mapping) and isinstance(value.get("INSTRUCTION"), str):
        parts = [part for entry in value.values() for part in (entry if isinstance(entry, list) else [entry])]
        return dict(value) if all(isinstance(part, str | int | None) for part in parts) else None
    return None
