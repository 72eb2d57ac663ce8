"""Which files of a folder make one DeepSpeed checkpoint: found by name, complete, and of one save.

Names: deepspeed 0.14.4, runtime/engine.py `_get_ckpt_name` and `_get_rank_zero_ckpt_name`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava_convert.core.errors import InputError, UnsafeError, UnsupportedError, unreadable
from llava_convert.core.text import listed, printable
from llava_convert.storage.files import open_regular, read_fully, relative_name, require_inside
from llava_convert.storage.zero.states import MEND, ModelState, OptimState, two_saves

LATEST = "latest"

# "pp" counts data parallel ranks and "mp" those that split each tensor, for history's sake. Old files lack the last
# "_" but one (engine.py tries both).
_FILE = re.compile(r"(?:(\w*zero_pp_rank_)(\d{1,6})_)?mp_rank_(\d{2,4})_?(model|optim)_states\.pt")
# Of pipelines and of mixtures of experts (runtime/pipe/module.py `ckpt_layer_path`, engine.py `_get_expert_ckpt_name`).
_OTHER = re.compile(r"(layer|expert|expp_rank)_.*_states\.pt")


def recognise(names: Iterable[str]) -> str | None:
    """Why a folder of these files is one of DeepSpeed's, None when it is not."""
    every = set(names)
    states = list(filter(_is_state, every))
    kinds = [kind for kind in ("model", "optim") if any(name.endswith(f"{kind}_states.pt") for name in states)]
    if kinds:
        return f"a DeepSpeed directory ({', '.join(f'*_{kind}_states.pt' for kind in kinds)})"
    # What DeepSpeed's own save_checkpoint makes; beside a config it belongs to a checkpoint of transformers or of peft.
    configs = {"config.json", "adapter_config.json"}
    return "a DeepSpeed directory (latest)" if LATEST in every and not configs & every else None


def _is_state(name: str) -> bool:
    return (_FILE.fullmatch(name) or _OTHER.fullmatch(name)) is not None


def state_folder(folder: Path) -> Path:
    """`folder`, or the one of the save that its `latest` names (engine.py `save_checkpoint`).

    Raises InputError where there is neither, UnsafeError where `latest` leads out of the folder.
    """
    names = _names(folder)
    if any(map(_is_state, names)):
        return folder
    if LATEST not in names:
        raise InputError(f"{printable(folder)}: it has no *_model_states.pt, as a DeepSpeed checkpoint has", hint=MEND)
    pointer = folder / LATEST
    with open_regular(require_inside(folder, LATEST)) as stream:
        tag = read_fully(stream, 4096, pointer).decode("utf-8", "replace").strip()
    plain = relative_name(tag)
    if plain is None:
        raise UnsafeError(f"{printable(pointer)}: names '{printable(tag)}', which is not a folder beside it")
    target = require_inside(folder, plain)
    try:
        there_is = target.is_dir()
    except OSError:  # no name of a file on this system
        there_is = False
    if not there_is:
        saves = [name for name in names if (folder / name).is_dir()]
        there = f"; there are {listed(saves)}" if saves else ""
        raise InputError(
            f"{printable(pointer)}: names {printable(plain)}, which does not exist{there}",
            hint="give the folder of one save",
        )
    if recognise(_names(target)) is None:
        raise InputError(f"{printable(target)}: it has no *_model_states.pt, as a DeepSpeed checkpoint has", hint=MEND)
    return target


def state_files(root: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Model states and optimizer states by rank; of the first there is one, except in ZeRO-3.

    Raises InputError naming files that are missing or of another save; UnsupportedError where the model was split in
    other ways than by ZeRO; UnsafeError for links that leave the folder.
    """
    series: dict[str, dict[str, dict[int, str]]] = {"model": {}, "optim": {}}
    for name in _names(root):
        match = _FILE.fullmatch(name)
        if _OTHER.fullmatch(name) or (match and int(match[3])):
            raise UnsupportedError(
                f"{printable(root / name)}: of a model that was split by layers, by experts or within its "
                "tensors, which "
                "is not read"
            )
        if match is None or (match[4] == "optim" and not match[1]):
            continue
        ranks = series[match[4]].setdefault(match[1] or "", {})
        other = ranks.setdefault(int(match[2] or 0), name)
        if other != name:
            raise two_saves(root / name, f"{other} is of the same rank")
    for found in series.values():
        if len(found) > 1:
            raise two_saves(root, listed(next(iter(ranks.values())) for ranks in found.values()))
    if not series["model"]:
        raise InputError(
            f"{printable(root)}: mp_rank_00_model_states.pt is missing "
            "(in ZeRO-3 zero_pp_rank_0_mp_rank_00_model_states.pt"
            "), which has the names of the weights",
            hint=MEND,
        )
    model, optim = (_by_rank(root, found, what) for what, found in series.items())
    return model, optim


def check_one_save(models: Sequence[ModelState], shares: Sequence[OptimState]) -> None:
    """Raises InputError unless there is a file of every rank, and all are of one save, as far as they tell."""
    head = models[0]
    partitioned = head.path.name.startswith("zero_pp_rank_")
    for share in shares:
        if partitioned != (share.stage == 3) or share.stage != shares[0].stage:
            other = head if partitioned != (share.stage == 3) else shares[0]
            raise two_saves(share.path, f"is of ZeRO-{share.stage}, {other.path.name} is not")
    first: ModelState | OptimState = shares[0] if shares else head
    states: list[ModelState | OptimState] = [*shares, *models]
    for state in states:
        if None not in (state.ranks, first.ranks) and state.ranks != first.ranks:
            raise two_saves(state.path, f"was saved by {state.ranks} ranks, {first.path.name} by {first.ranks}")
    if first.ranks is not None:
        for paths in ([share.path for share in shares], [state.path for state in models] if partitioned else []):
            _check_count(paths, first.ranks)
    for group in ([*models], [*shares]):
        for state in group:
            if None not in (state.step, group[0].step) and state.step != group[0].step:
                told = f"was saved at step {state.step}, {group[0].path.name} at step {group[0].step}"
                raise two_saves(state.path, told)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error, "cannot be listed") from error


def _by_rank(root: Path, series: dict[str, dict[int, str]], what: str) -> tuple[Path, ...]:
    """The paths of the one series that there is, or none."""
    for prefix, ranks in series.items():
        count = max(ranks) + 1
        missing = [
            f"{prefix}{rank}_mp_rank_00_{what}_states.pt"
            for rank in range(min(count, len(ranks) + 8))  # enough for a message, whatever number a name holds
            if rank not in ranks
        ]
        if missing:
            raise InputError(f"{printable(root)}: files of some ranks are missing: {listed(missing)}", hint=MEND)
        return tuple(require_inside(root, ranks[rank]) for rank in range(count))
    return ()


def _check_count(paths: Sequence[Path], ranks: int) -> None:
    if not paths or len(paths) == ranks:
        return
    if len(paths) > ranks:
        raise two_saves(paths[ranks], f"{ranks} ranks saved {paths[0].name}")
    missing = re.sub(r"(zero_pp_rank_)\d+", rf"\g<1>{len(paths)}", paths[-1].name)
    more = f" and {ranks - len(paths) - 1} more of its kind" if ranks - len(paths) > 1 else ""
    raise InputError(f"{printable(paths[0].parent / missing)}{more}: missing; {ranks} ranks saved this", hint=MEND)
