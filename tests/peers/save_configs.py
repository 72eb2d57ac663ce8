"""Small files as this environment's transformers saves them, every key written out: `save_configs.py RESULT`.

The job on stdin has `out`, a folder for them, and `tokenizer`, a folder to load one from. RESULT gets {"version": ...}
and, where the llava package is there, {"llava": the keys that its code puts into a config}.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "MistralConfig": {},
    "Qwen2Config": {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    "Phi3Config": {"pad_token_id": 0},
}
PROCESSORS = ("CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor")


def _write(config: Any, folder: Path) -> None:
    """Once as a user saves it, and once with every key, defaults too."""
    for name, whole in (("saved", True), ("whole", False)):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(config.to_json_string(use_diff=whole))


def _configs(out: Path) -> None:
    texts = {name: getattr(transformers, name)(**SMALL, **more) for name, more in TEXT.items() if _has(name)}
    towers = {
        "CLIPVisionConfig": transformers.CLIPVisionConfig(projection_dim=32, **SMALL),
        "SiglipVisionConfig": transformers.SiglipVisionConfig(**SMALL) if _has("SiglipVisionConfig") else None,
    }
    for name, config in {**texts, **towers}.items():
        if config is not None:
            _write(config, out / name)
    for text, config in texts.items():
        for tower, eyes in towers.items():
            if eyes is not None:
                _write(transformers.LlavaConfig(vision_config=eyes, text_config=config), out / f"{text}-{tower}")


def _has(name: str) -> bool:
    return hasattr(transformers, name)


def _generation(out: Path) -> None:
    config = transformers.GenerationConfig(eos_token_id=[1, 2], do_sample=True, temperature=0.6, top_p=0.9)
    config.save_pretrained(out / "generation")
    (out / "generation-whole").mkdir()
    (out / "generation-whole" / "generation_config.json").write_text(config.to_json_string(use_diff=False))


def _processors(out: Path, tokenizer: str) -> None:
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    loaded.save_pretrained(out / "tokenizer")
    for name in PROCESSORS:
        try:
            processor = getattr(transformers, name)()
        except (AttributeError, ImportError):  # an older release, or one that wants torchvision
            continue
        processor.save_pretrained(out / name)
        if name == "CLIPImageProcessor" and VERSION >= (4, 46):  # before, it takes Llama's own tokenizers alone
            transformers.LlavaProcessor(processor, loaded).save_pretrained(out / "processor")


def _put_by_llava() -> list[str]:
    """Names that the code of the llava package assigns in a model's config."""
    spec = find_spec("llava")
    if spec is None or not spec.submodule_search_locations:
        return []
    files = Path(next(iter(spec.submodule_search_locations))).rglob("*.py")
    put = re.compile(r"(?:self|model|cfg)\.config\.(\w+)\s*=[^=]")
    return sorted({name for file in files for name in put.findall(file.read_text(encoding="utf-8"))})


def main() -> None:
    """Run the job."""
    job = json.load(sys.stdin)
    out = Path(job["out"])
    _configs(out)
    _generation(out)
    _processors(out, job["tokenizer"])
    Path(sys.argv[1]).write_text(json.dumps({"version": transformers.__version__, "llava": _put_by_llava()}))


if __name__ == "__main__":
    main()
