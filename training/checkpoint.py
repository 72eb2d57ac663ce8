"""`iter_N.pth` in the structure of mmengine 0.10's CheckpointHook, written whole or not at all, and read back safely.

Top level, in order: meta, state_dict, message_hub, optimizer, param_schedulers. The real xtuner resumes and converts
these files, and this module resumes the real one's; llava-convert's own reader reads them, which executes nothing.
"""

from __future__ import annotations

import io
import os
import re
import sys
import time
import types
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from llava_convert.core.errors import InputError
from llava_convert.core.tensors import StoredTensor
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.streams import read_whole
from llava_convert.storage.torch.file import read_torch
from llava_convert.storage.zero.checkpoint import read_zero

from .disk import unwritten
from .model import State, as_tensor
from .recipe import recipe_names

MMENGINE = "0.10.7"  # whose structure this is
POINTER = "last_checkpoint"
_NAME = re.compile(r"iter_(\d+)\.pth")


class HistoryBuffer:
    """Stands in for mmengine's class of this name, and is pickled under it: a scalar of every iteration."""

    def __init__(self, values: Sequence[float]) -> None:
        self.max_length = 1000000
        self._log_history = np.array(values, np.float64)
        self._count_history = np.ones(len(values), np.int64)
        cls = HistoryBuffer
        # mmengine pickles these with each instance; its log processor calls them by name after a resume.
        self.statistics_methods = {"min": cls.min, "max": cls.max, "current": cls.current, "mean": cls.mean}

    def min(self) -> None: ...

    def max(self) -> None: ...

    def current(self) -> None: ...

    def mean(self) -> None: ...


def pickled_as_mmengines() -> None:
    """Let HistoryBuffer be pickled, and found again, as the class of mmengine, which need not be installed."""
    module = "mmengine.logging.history_buffer"
    if HistoryBuffer.__module__ == module:
        return
    for one in (HistoryBuffer, *HistoryBuffer.__dict__.values()):
        if callable(one):
            one.__module__ = module
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules[module].HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Progress:
    """Where a run stands: what mmengine keeps beside the weights. `scalars` are by name, one value an iteration."""

    iteration: int
    iterations: int
    epoch: int
    epochs: float
    seed: int
    config: str
    experiment: str
    scalars: Mapping[str, Sequence[float]]
    eta: float = 0.0
    processes: int = 1

    def meta(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "iter": self.iteration,
            "cfg": self.config,
            "seed": self.seed,
            "experiment_name": self.experiment,
            "time": time.strftime("%Y%m%d_%H%M%S"),
            "mmengine_version": MMENGINE,
        }

    def message_hub(self, path: Path) -> dict[str, Any]:
        pickled_as_mmengines()
        runtime = OrderedDict(
            cfg=self.config,
            seed=self.seed,
            experiment_name=self.experiment,
            mmengine_version=MMENGINE,
            loop_stage="train",
            epoch=self.epoch,
            iter=self.iteration - 1,
            max_epochs=self.epochs,
            max_iters=self.iterations,
            eta=float(self.eta),
            keep_ckpt_ids=[self.iteration],
            last_ckpt=str(path.absolute()),
            world_size=self.processes,  # ours alone: iterations are counted for each process
        )
        scalars = OrderedDict((f"train/{name}", HistoryBuffer(values)) for name, values in self.scalars.items())
        resumed = OrderedDict.fromkeys([*runtime, *scalars], True)
        return {"log_scalars": scalars, "runtime_info": runtime, "resumed_keys": resumed}


def write_checkpoint(
    path: Path, state: State, optimizer: Mapping[str, Any], schedulers: Sequence[Mapping[str, Any]], progress: Progress
) -> None:
    """Write a checkpoint; the name appears when its bytes are on the disk.

    Raises OutputError where it cannot be written: the checkpoints before it, and `last_checkpoint`, stay as they are.
    """
    tensors = OrderedDict((name, tensor.detach().cpu().clone()) for name, tensor in state.items())
    tensors._metadata = OrderedDict()  # type: ignore[attr-defined]  # torch's modules put it there
    content = {
        "meta": progress.meta(),
        "state_dict": tensors,
        "message_hub": progress.message_hub(path),
        "optimizer": _to_cpu(optimizer),
        "param_schedulers": [dict(one) for one in schedulers],
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            # Through a writer that is no file: torch then calls the zip's root `archive`, as mmengine's are called.
            writer = _Writer(file)
            try:
                torch.save(content, cast(IO[bytes], writer), pickle_protocol=2)
            except RuntimeError as problem:
                raise writer.problem or problem from None
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        point_at(path)
    except OSError as problem:
        raise unwritten(problem, path) from None
    finally:
        partial.unlink(missing_ok=True)


class _Writer(io.RawIOBase):
    """Writes to a file, and keeps what went wrong: torch answers with an error that names a line of its own source."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.problem: BaseException | None = None

    def write(self, data: Any) -> int:
        try:
            return int(self.file.write(data))
        except BaseException as problem:  # a full disk, or a signal
            self.problem = self.problem or problem
            raise

    def flush(self) -> None:
        self.file.flush()


def point_at(path: Path) -> None:
    """Name the newest checkpoint in `last_checkpoint`, as mmengine does: by its absolute path."""
    partial = path.with_name(f".{POINTER}.partial")
    partial.write_text(str(path.absolute()), encoding="utf-8")
    partial.replace(path.with_name(POINTER))


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; -1 keeps all."""
    if keep > 0:
        for path in checkpoints(folder)[:-keep]:
            if path.is_dir():
                import shutil

                shutil.rmtree(path)
            else:
                path.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a work_dir, oldest first: files, or DeepSpeed's folders."""
    found = [(int(m[1]), p) for p in folder.glob("iter_*.pth") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def stage_one(pretrained: str) -> Path:
    """The checkpoint that `model.pretrained` names: of a work_dir the newest one.

    Raises InputError where there is none, with the command that makes it where that is known.
    """
    path = Path(pretrained)
    if path.is_dir() and (found := checkpoints(path)):
        return found[-1]
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / "tokens").is_dir()):
        return path
    makes = f"first: llava-convert train {path.name}; " if path.name in recipe_names() else ""
    raise InputError(
        f"model.pretrained {pretrained}: {'holds no checkpoint' if path.exists() else 'there is no such checkpoint'}",
        hint=f'{makes}or name another: --set model.pretrained=PATH, and "" for none',
    )


@dataclass(frozen=True)
class Resumable:
    """What a run is taken up from."""

    iteration: int
    seed: int
    processes: int | None  # None: the real xtuner does not tell
    config: str
    state: dict[str, torch.Tensor]
    optimizer: dict[int, dict[str, torch.Tensor]]


def read_checkpoint(path: Path) -> Resumable:
    """A checkpoint of ours or of the real xtuner's; of a DeepSpeed folder the counters alone.

    Raises InputError where weights, optimiser state or counters are missing.
    """
    if path.is_dir():
        zero = read_zero(path)
        try:
            return Resumable(int(zero.meta["iter"]), int(zero.meta["seed"]), zero.ranks, str(zero.meta["cfg"]), {}, {})
        except (KeyError, TypeError):
            raise InputError(f"{path}: cannot be resumed: it lacks mmengine's counters (meta)") from None
    root = _plain(read_torch(path).root)
    try:
        meta, tensors, optimizer = root["meta"], root["state_dict"], root["optimizer"]["state"]
        iteration, seed = meta["iter"], meta["seed"]
    except (KeyError, TypeError):
        raise InputError(
            f"{path}: cannot be resumed: it lacks weights, optimiser state or counters",
            hint="as model.pretrained its weights can start a new run",
        ) from None
    with FilePool() as pool:

        def load(value: Any) -> Any:
            return as_tensor(read_whole(pool, value), value.dtype) if isinstance(value, StoredTensor) else value

        return Resumable(
            int(iteration),
            int(seed),
            _processes(root.get("message_hub")),
            str(meta.get("cfg", "")),
            {name: load(t) for name, t in tensors.items() if isinstance(t, StoredTensor)},
            {int(i): {k: load(v) for k, v in one.items()} for i, one in optimizer.items()},
        )


def _processes(hub: Any) -> int | None:
    found = hub.get("runtime_info", {}).get("world_size") if isinstance(hub, dict) else None
    return found if isinstance(found, int) else None


def _plain(value: Any) -> Any:
    """Dicts which the reader left as inert objects (OrderedDict and its kin) as dicts."""
    mapping = getattr(value, "mapping", None) if not isinstance(value, dict) else value
    return {k: _plain(v) for k, v in mapping.items()} if isinstance(mapping, dict) else value


def _to_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {k: _to_cpu(v) for k, v in value.items()}
    return [_to_cpu(v) for v in value] if isinstance(value, list) else value
