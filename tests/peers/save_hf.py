"""Save a LLaVA with this environment's transformers: `save_hf.py RESULT`, with a JSON list of {folder, out} on stdin.

Makes `out/saved` by save_pretrained, and `out/state_dict` as a trainer does which dumps the model's state dict.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration


def save(folder: Path, out: Path) -> list[str]:
    """Both ways to save one model; returns the names of the state dict."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, torch_dtype="auto")
    model.save_pretrained(out / "saved")
    dumped = out / "state_dict"
    dumped.mkdir()
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, dumped / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(dumped)
    for target in (out / "saved", dumped):
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json"):
            shutil.copy(folder / file, target)
    return sorted(weights)


def main() -> None:
    """Run the job."""
    job = json.load(sys.stdin)
    names = {each["out"]: save(Path(each["folder"]), Path(each["out"])) for each in job}
    Path(sys.argv[1]).write_text(json.dumps(names))


if __name__ == "__main__":
    main()
