"""An mmproj for the stock llama.cpp, which puts a CLIP tower's class token behind the patches (`--mmproj-for stock`).

Its graph of LLaVA (models/llava.cpp, ggml-org/llama.cpp#25814) adds the first position to the first patch, where the
tower was trained with the class token there, and leaves the first row out afterwards. With the first position moved to
the end every patch and the class token get their own; the first patch is still lost, and the class token's features go
to the language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llava_convert.core.errors import InputError, UsageError
from llava_convert.core.tensors import StoredTensor
from llava_convert.model.checkpoint import VISION, Parts
from llava_convert.model.configs import family
from llava_convert.model.recipe import joined_recipe
from llava_convert.model.renaming import Renamed
from llava_convert.ops.join import Part

KEY = "llava.mmproj_for"
_DISK = "v.position_embd.weight"
_CANONICAL = f"{VISION}.vision_model.embeddings.position_embedding.weight"
# In the order of the model: of the class token, and of the patches.
_PARTS = (f"{_CANONICAL}[0]", f"{_CANONICAL}[1]")


def rolled(tower: list[Renamed], config: Mapping[str, Any]) -> list[Renamed]:
    """The tower's tensors, the first position last. Raises UsageError (exit 2) for a tower without a class token."""
    if not family(VISION, config).class_token:
        raise UsageError(
            f"--mmproj-for stock does not apply: a {config['model_type']} has no class token, so llama.cpp "
            "already computes it correctly",
            hint="leave it out",
        )
    return [_moved(one) if one.name == _DISK else one for one in tower]


def _moved(one: Renamed) -> Renamed:
    rows = one.recipe.shape[0]
    first, rest = (one.recipe.part(part) for part in _spans(rows, 1))
    return replace(one, recipe=joined_recipe([rest, first], 1), members=((_PARTS[1], rest), (_PARTS[0], first)))


def _spans(rows: int, first: int) -> tuple[Part, Part]:
    return Part(1, 0, first, rows), Part(1, first, rows - first, rows)


def taken_apart(weights: dict[str, StoredTensor], joins: dict[str, Parts]) -> None:
    """Put the positions of such a file among the weights as the parts that make up the model's own.

    Raises InputError where there are none.
    """
    stored = weights.pop(_CANONICAL, None)
    if stored is None or not stored.shape or stored.shape[0] < 2:
        raise InputError(f"the mmproj lacks {_DISK}", hint="it is incomplete; get it again")
    for name, part in zip(reversed(_PARTS), _spans(stored.shape[0], stored.shape[0] - 1), strict=True):
        tensor = part.stored(stored)
        assert tensor is not None  # a GGUF's tensors lie row by row
        weights[name] = tensor
    joins[_CANONICAL] = Parts(_PARTS, 1)
