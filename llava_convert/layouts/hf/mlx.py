"""What mlx-vlm saves: transformers' names and config, the weights of convolutions in another order of axes.

mlx-vlm 0.7.10 (utils.py `save_weights`, models/llava): its files say `format: mlx`, and a patch embedding is [out,
height, width, in] where torch has [out, in, height, width].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from llava_convert.core.tensors import StoredTensor
from llava_convert.storage.headers import Headers
from llava_convert.storage.safetensors import SUFFIX
from llava_convert.storage.weights import Weights

_CONVOLUTION = ".patch_embedding.weight"


def from_mlx(weights: Weights, headers: Headers) -> tuple[Mapping[str, StoredTensor], tuple[str, ...]]:
    """The tensors as torch has them, and what to tell of it; those of another writer as they are."""
    files = [path for path in weights.files if path.suffix.lower() == SUFFIX]
    if not any(headers.safetensors(path).metadata.get("format") == "mlx" for path in files):
        return weights.tensors, ()
    found = {
        name: _turned(tensor) if name.endswith(_CONVOLUTION) else tensor for name, tensor in weights.tensors.items()
    }
    return found, ("it was saved by MLX: the axes of the patch embedding are put in torch's order",)


def _turned(tensor: StoredTensor) -> StoredTensor:
    """[out, height, width, in] seen as [out, in, height, width]: a view with strides, of the same bytes."""
    if len(tensor.shape) != 4:
        return tensor
    out, height, width, inner = tensor.shape
    strides = (height * width * inner, 1, width * inner, inner)
    return replace(tensor, shape=(out, inner, height, width), strides=strides)
