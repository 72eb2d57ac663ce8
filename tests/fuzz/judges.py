"""What others' readers say of a folder: transformers, gguf-py, safetensors and huggingface_hub. None of it is ours.

A complaint is worth something only where the same reader took the source: what it refused before, it may refuse after.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Judges = dict[str, Callable[[Path], None]]


def complaints(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """The readers, of those named, that do not take the folder, with what each says."""
    found = {}
    with _quiet():
        for name in names:
            try:
                JUDGES[name](folder)
            except Exception as problem:  # whatever they raise is their verdict
                found[name] = f"{type(problem).__name__}: {str(problem)[:300]}"
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _config(folder: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.from_pretrained(folder)


def _tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder)("a picture")


def _processor(folder: Path) -> None:
    from transformers import AutoProcessor

    AutoProcessor.from_pretrained(folder)


def _generation(folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        GenerationConfig.from_pretrained(folder)


def _model(folder: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    _, said = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, dtype="auto")
    wrong = {name: keys for name, keys in said.items() if keys}
    if wrong:
        raise ValueError(f"{wrong}")


def _safetensors(folder: Path) -> None:
    from safetensors import safe_open

    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no dict
                file.get_tensor(name)


def _gguf(folder: Path) -> None:
    from gguf import GGUFReader

    for path in folder.rglob("*.gguf"):
        reader = GGUFReader(path)
        for field in reader.fields.values():
            field.contents()
        for tensor in reader.tensors:
            tensor.data.sum()


def _card(folder: Path) -> None:
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if path.exists():
        ModelCard(path.read_text(encoding="utf-8")).data.to_dict()


JUDGES: Judges = {
    "AutoConfig": _config,
    "AutoTokenizer": _tokenizer,
    "AutoProcessor": _processor,
    "GenerationConfig": _generation,
    "LlavaForConditionalGeneration": _model,
    "safetensors": _safetensors,
    "GGUFReader": _gguf,
    "ModelCard": _card,
}
OF_LAYOUT: dict[str, tuple[str, ...]] = {
    "hf": tuple(name for name in JUDGES if name != "GGUFReader"),
    "official": ("AutoTokenizer", "GenerationConfig", "safetensors", "ModelCard"),
    "xtuner": ("AutoTokenizer", "GenerationConfig", "safetensors", "ModelCard"),
    "gguf": ("GGUFReader", "ModelCard"),
    "pth": (),
}
# What reads others of these on its way: where they refuse the source, it cannot do else.
PARTS: dict[str, tuple[str, ...]] = {
    "AutoProcessor": ("AutoTokenizer", "AutoConfig"),
    "AutoTokenizer": ("AutoConfig",),
    "LlavaForConditionalGeneration": ("AutoConfig", "GenerationConfig"),
}
