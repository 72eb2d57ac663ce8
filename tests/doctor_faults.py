"""Faults of the small files of an hf folder, as other tools leave them: each with the rule that finds it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

OLD_TEMPLATE = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] + '<|eot_id|>' }}{% endfor %}"
)


def edit(folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads((folder / file).read_text())
    change(value)
    (folder / file).write_text(json.dumps(value))


def _no_processor(folder: Path) -> None:
    (folder / "processor_config.json").unlink()


def _one_token_less(folder: Path) -> None:
    edit(folder, "processor_config.json", lambda c: c.pop("num_additional_image_tokens"))


def _image_id(folder: Path) -> None:
    edit(folder, "config.json", lambda c: c.update(image_token_id=c.pop("image_token_index")))


def _pad_id(folder: Path) -> None:
    edit(folder, "config.json", lambda c: c.update(pad_token_id=100_000))


def _vocab_size(folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["vocab_size"] = config["text_config"]["vocab_size"] = 512

    edit(folder, "config.json", change)


def _one_stop(folder: Path) -> None:
    edit(folder, "generation_config.json", lambda c: c.update(eos_token_id=c["eos_token_id"][0]))


def _other_eos(folder: Path) -> None:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        edit(folder, file, lambda c: c.update(eos_token="<|end_of_text|>"))


def _text_template(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", lambda c: c.update(chat_template=OLD_TEMPLATE))
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").unlink()


def _new_rope(folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        text = config["text_config"]
        text.pop("rope_scaling", None)
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}

    edit(folder, "config.json", change)


def _new_tokenizer_class(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", lambda c: c.update(tokenizer_class="TokenizersBackend"))


def _nested_image_processor(folder: Path) -> None:
    nested = json.loads((folder / "preprocessor_config.json").read_text())
    edit(folder, "processor_config.json", lambda c: c.update(image_processor=nested))
    (folder / "preprocessor_config.json").unlink()


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no processor": (_no_processor, "processor"),
    "one token less": (_one_token_less, "processor"),
    "image_token_id alone": (_image_id, "image token"),
    "vocab_size of another": (_vocab_size, "vocabulary"),
    "pad id past the rows": (_pad_id, "pad id"),
    "one stop": (_one_stop, "stops"),
    "another eos": (_other_eos, "tokenizer eos"),
    "template for text": (_text_template, "list content"),
    "rope_parameters": (_new_rope, "rope"),
    "TokenizersBackend": (_new_tokenizer_class, "tokenizer class"),
    "nested image processor": (_nested_image_processor, "preprocessor"),
}


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file({n: t.contiguous() for n, t in change(load_file(file)).items()}, file, {"format": "pt"})


def _two_dtypes(folder: Path) -> None:
    name = "multi_modal_projector.linear_1.bias"
    _weights(folder, lambda tensors: tensors | {name: tensors[name].half()})


def _new_names(folder: Path) -> None:
    _weights(
        folder, lambda t: {n.replace("language_model.model.", "model.language_model."): one for n, one in t.items()}
    )


def _no_image_token(folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_text((folder / file).read_text().replace("<image>", "<img>"))


def _too_few_rows(folder: Path) -> None:
    _vocab_size(folder)
    kinds = ("embed_tokens.weight", "lm_head.weight")
    _weights(folder, lambda t: {n: one[:512] if n.endswith(kinds) else one for n, one in t.items()})


# What no small file can mend.
LASTING: dict[str, tuple[Callable[[Path], None], str]] = {
    "two dtypes": (_two_dtypes, "dtypes"),
    "new names": (_new_names, "names"),
    "no image token": (_no_image_token, "image token"),
    "ids without rows": (_too_few_rows, "rows"),
}


def planted(good: Path, out: Path, fault: str) -> Path:
    """A copy of a folder with a fault in it."""
    shutil.copytree(good, out)
    (FAULTS | LASTING)[fault][0](out)
    return out
