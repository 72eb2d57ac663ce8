"""A DeepSpeed directory put together by torch alone, the way of deepspeed/utils/zero_to_fp32.py."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


class Stub(dict):  # type: ignore[type-arg]  # a ConfigDict is a dict
    """Stands for the classes of mmengine and DeepSpeed, which are not installed here."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args if args and isinstance(args[0], dict) else ())
        self.args = args

    def __setstate__(self, state: Any) -> None:
        pass

    min = max = mean = current = None  # what a HistoryBuffer pickles as getattr(HistoryBuffer, "min")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(("mmengine", "deepspeed")):
            return Stub
        return super().find_class(module, name)


_PICKLE = SimpleNamespace(__name__="stubs", Unpickler=_Unpickler, load=lambda file, **_: _Unpickler(file).load())


def load_states(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PICKLE)


def masters(folder: Path) -> dict[str, torch.Tensor]:
    """The float32 master weights by name, in the order of `param_shapes`; tied names under both."""
    model = load_states(sorted(folder.glob("*_model_states.pt"))[0])
    ranks = [load_states(path)["optimizer_state_dict"] for path in sorted(folder.glob("*_optim_states.pt"))]
    found: dict[str, torch.Tensor] = {}
    if "fp32_flat_groups" in ranks[0]:
        flats = [torch.cat(rank["fp32_flat_groups"]).detach() for rank in ranks]
        at = 0
        for name, shape in ((name, shape) for group in model["param_shapes"] for name, shape in group.items()):
            part = math.ceil(shape.numel() / len(ranks))
            whole = torch.cat([flat[at : at + part] for flat in flats])
            found[name] = whole[: shape.numel()].reshape(shape)
            at += part
    else:
        for index, group in enumerate(model["param_shapes"]):
            flat = torch.cat([rank["single_partition_of_fp32_groups"][index] for rank in ranks]).detach()
            at = 0
            for name, shape in group.items():
                found[name] = flat[at : at + shape.numel()].reshape(shape)
                at += shape.numel()
    for name, source in model["shared_params"].items():
        if source in found:
            found[name] = found[source]
    return found
