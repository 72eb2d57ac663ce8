"""The folder of a run of HF Trainer: which of its `checkpoint-N` is meant.

`trainer_state.json` of each checkpoint names the best so far, where the run measures which that is
(transformers/trainer_callback.py, TrainerState.best_model_checkpoint).
"""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath

from llava_convert.core.text import listed
from llava_convert.core.values import dataclass
from llava_convert.layouts.base import Found
from llava_convert.storage.sidecars import folder_sidecars

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
_OWN = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
_STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})(?:\.bin)?")
_PROJECTORS = "mm_projector"  # where official LLaVA's pretraining puts checkpoint-N.bin (llava/train/train.py)


@dataclass(frozen=True)
class Run:
    """The checkpoint that is taken of a run, and the note that says so."""

    checkpoint: Path
    note: str


def followed(found: Found) -> Run | None:
    """The best checkpoint of a run, where its trainer names one that is there, else the newest; None for no run.

    Raises InputError for a broken trainer_state.json.
    """
    if not found.path.is_dir():
        return None
    steps = {int(match[1]): name for name in found.names if (match := _CHECKPOINT.fullmatch(name))}
    there = {step: name for step, name in sorted(steps.items()) if _holds(found.path / name)}
    if not there:
        inner = found.path / _PROJECTORS
        if _PROJECTORS not in found.names or not inner.is_dir():
            return None
        names = frozenset(entry.name for entry in inner.iterdir())
        return followed(Found(inner, None, names, folder_sidecars(inner)))
    newest = there[max(there)]
    best = _best(found.path) or _best(found.path / newest)
    name = best if best is not None and best in there.values() else newest
    why = "the best, by its trainer_state.json" if best == name else "the newest"
    return Run(
        found.path / name,
        f"{found.path.name} is the folder of a training: {name} is taken, {why} (it holds {listed(there.values())})",
    )


def has_weights(found: Found) -> bool:
    """Whether a folder has files of weights of its own, besides what a trainer keeps for itself."""
    return any(name.endswith(_WEIGHTS) and not name.startswith(_OWN) for name in found.names)


def _holds(path: Path) -> bool:
    """Whether a checkpoint holds anything: a folder of weights or adapters, or a file."""
    return path.is_file() or (path.is_dir() and any(one.suffix in _WEIGHTS for one in path.iterdir()))


def _best(folder: Path) -> str | None:
    files = folder_sidecars(folder)
    state = files.read_json(_STATE) if files.has(_STATE) else None
    named = state.get("best_model_checkpoint") if isinstance(state, dict) else None
    # A path on the machine that trained.
    return PureWindowsPath(named).name if isinstance(named, str) else None
