"""Programs that OUT is computed by, a row each; SOURCE is always computed as it was trained, by this package."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from llava_convert.app.ask.load import llama_cpp_notes
from llava_convert.app.ask.runtimes import LLAMA_CPP, TRANSFORMERS
from llava_convert.app.logits.shown import Shows
from llava_convert.core.errors import UsageError
from llava_convert.core.text import listed
from llava_convert.core.values import dataclass
from llava_convert.layouts.info import LAYOUTS
from llava_convert.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Row:
    """A program: the name by which layouts know it, the module that loads a model for it, what it rounds to.

    `rounds` is the dtype that the program itself rounds sums to, whatever the weights are in.
    """

    loader: str
    module: str
    rounds: str = "float32"

    def layouts(self) -> tuple[str, ...]:
        return tuple(info.name for info in LAYOUTS.values() if self.loader in info.loaders)

    def load(self, checkpoint: Checkpoint, device: Any, visual_encoder: str | None) -> Shows:
        """Load a model; `visual_encoder` stands for the tower that its config names."""
        module: Any = import_module(f"llava_convert.app.logits.{self.module}")
        found: Shows = module.load(checkpoint, device, visual_encoder)
        return found

    def notes(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """What the program is known to compute otherwise."""
        return llama_cpp_notes(checkpoint) if self.loader == LLAMA_CPP else ()


RUNTIMES = {
    TRANSFORMERS: Row("transformers", "by_transformers"),
    "official": Row("llava", "by_llava"),
    # It multiplies rows of float16 weights with rows rounded to the same.
    LLAMA_CPP: Row("llama.cpp", "by_llama_cpp", rounds="float16"),
    "mlx": Row("transformers", "by_mlx"),
}


def runtime_for(name: str, checkpoint: Checkpoint) -> Row:
    """The row of a name. Raises UsageError where that program does not read the layout."""
    row = RUNTIMES[name]
    if checkpoint.layout not in (layouts := row.layouts()):
        raise UsageError(
            f"--runtime {name}: {checkpoint.path.name} is {checkpoint.layout}, which {name} does not read",
            hint=f"convert it with --to {listed(layouts)}, or leave --runtime out",
        )
    return row
