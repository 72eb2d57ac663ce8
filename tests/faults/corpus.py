"""A tiny valid checkpoint of each layout to damage, and what every refusal must look like.

A test works in a folder of its own: copies of sources go into it, the command line runs on them, and `refused` compares
the whole folder before and after. So one assertion covers the target, leftovers of staging, and the sources.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llava_convert.cli import app

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "fixtures" / "tiny"
COMMAND = "from llava_convert.cli import main; main()"
State = dict[str, torch.Tensor]

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Ran:
    """What one run of the command line said."""

    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.stdout)
        return found


def run(*arguments: str | Path) -> Ran:
    """The command line in this process: fast, the same code down from the argument parser."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="llava-convert")
    return Ran(result.exit_code, result.stdout, result.stderr)


def shell(
    *arguments: str | Path,
    code: str = COMMAND,
    environment: Mapping[str, str] | None = None,
    limits: Mapping[int, int] | None = None,
    cwd: Path | None = None,
    timeout: float = 60,
) -> Ran:
    """The command line in a process of its own, for signals, limits and closed pipes."""
    process = start(*arguments, code=code, environment=environment, limits=limits, cwd=cwd)
    stdout, stderr = process.communicate(timeout=timeout)
    return Ran(process.returncode, stdout, stderr)


def start(
    *arguments: str | Path,
    code: str = COMMAND,
    environment: Mapping[str, str] | None = None,
    limits: Mapping[int, int] | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[str]:
    def bound() -> None:
        for which, size in (limits or {}).items():
            resource.setrlimit(which, (size, size))

    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        cwd=cwd,
        preexec_fn=bound if limits else None,
    )


def tree(folder: Path) -> dict[str, str]:
    """Every path under `folder` with its kind or the hash of its bytes: links are named, not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "special"
    return found


def assert_clean(folder: Path) -> None:
    """No temporary name is left anywhere."""
    left = [n for n in tree(folder) if n.endswith((".partial", ".lock", ".old", ".unfinished"))]
    assert not left, f"left behind: {left}"


def assert_refused(ran: Ran, code: int, *fragments: str, mend: str | None = None) -> None:
    """Exit code, one error with its fragments, the mend in the line below it, no traceback, nothing on stdout."""
    assert ran.code == code, f"exit {ran.code}, expected {code}: {ran.stderr}"
    assert len(ran.errors) == 1, ran.stderr
    assert "Traceback" not in ran.stderr and "bug in llava-convert" not in ran.stderr
    at = ran.stderr.index(ran.errors[0])
    said = ran.stderr[at:]
    assert len(said) < 4000, f"{len(said)} characters of error"
    for fragment in fragments:
        assert fragment in said, f"{fragment!r} is not in: {said}"
    if mend is not None:
        hints = [line for line in said.splitlines() if line.startswith("  → ")]
        assert hints and mend in hints[0], f"{mend!r} is not the mend of: {said}"
    assert ran.stdout == "", ran.stdout


def refused(folder: Path, code: int, *fragments: str, args: tuple[str | Path, ...], mend: str | None = None) -> Ran:
    """Run the command line on sources in `folder`: it must refuse, and leave the folder as it was."""
    before = tree(folder), tree(TINY)
    ran = run(*args)
    assert_refused(ran, code, *fragments, mend=mend)
    assert (tree(folder), tree(TINY)) == before
    return ran


def accepted(*args: str | Path) -> Ran:
    """Run the command line; it must succeed."""
    ran = run(*args)
    assert ran.code == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    return ran


# -- sources to damage


def tiny(folder: Path) -> Path:
    """A copy of the committed checkpoint and its bases; returns the `.pth`, which names them from `folder`."""
    shutil.copytree(TINY, folder / "tiny", dirs_exist_ok=True)
    return folder / "tiny" / "iter_2.pth"


def bases(folder: Path = TINY) -> tuple[str | Path, ...]:
    return ("--llm", folder / "llm", "--visual-encoder", folder / "vit")


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object; None takes a key away."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content |= changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def edit_tensors(path: Path, change: Callable[[State], State | None]) -> None:
    """Rewrite a safetensors file after `change`, which edits the dict or returns another."""
    state = load_file(path)
    state = change(state) or state
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata={"format": "pt"})


class _Buffer:
    min = max = current = mean = None


def trained() -> tuple[OrderedDict[str, torch.Tensor], str]:
    """The state dict of the committed `.pth` and its training config, by torch's own reader."""
    with _stand_ins("mmengine.logging.history_buffer", HistoryBuffer=_Buffer):
        content = torch.load(TINY / "iter_2.pth", weights_only=False)
    return OrderedDict(content["state_dict"]), content["meta"]["cfg"]


@contextmanager
def _stand_ins(module: str, **names: object) -> Iterator[None]:
    parts = module.split(".")
    made = [".".join(parts[: n + 1]) for n in range(len(parts)) if ".".join(parts[: n + 1]) not in sys.modules]
    for name in made:
        sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[module]).update(names)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def write_pth(path: Path, state: Mapping[str, torch.Tensor], cfg: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {} if cfg is None else {"cfg": cfg}
    torch.save({"meta": meta, "state_dict": OrderedDict(state)}, path)
    return path


@dataclass(frozen=True)
class Corpus:
    """Valid checkpoints, one of each layout, all made from the committed `.pth`: never changed, only copied."""

    folder: Path
    layouts: Mapping[str, Path] = field(default_factory=dict)

    def copy(self, layout: str, to: Path) -> Path:
        """A copy under the folder `to`, called as the layout; a `.pth` comes with its bases beside it."""
        if layout == "pth":
            return tiny(to)
        return Path(shutil.copytree(self.layouts[layout], to / layout))


def make_corpus(folder: Path) -> Corpus:
    made = {}
    for layout in ("xtuner", "official", "hf"):
        made[layout] = folder / layout
        accepted("pth", TINY / "iter_2.pth", "--to", layout, "-o", made[layout], *bases())
    return Corpus(folder, made)
