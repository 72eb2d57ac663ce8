"""The real llama.cpp: its converter and its quantiser, each result made once, and questions to its runtimes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.interop.peer_programs import PEERS, SCRIPTS, in_peer

ENVIRONMENT = "llama.cpp"
# What llama.cpp's converter calls the pre-tokenizers of tokenizers that were made here, by the fixtures' name for them.
PRE = {"tiny": "llama-bpe", "qwen2": "qwen2", "smollm": "smollm", "phi-4": "gpt-4o"}

Value = tuple[tuple[str, ...], Any]
"""Types (an array's own and that of its elements) and value."""


@dataclass(frozen=True)
class Tensor:
    """What a file holds of one tensor: ggml's type, dimensions in ggml's order, bytes."""

    type: str
    shape: tuple[int, ...]
    data: bytes


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file in the file's order, read by gguf-py."""
    found = gguf.GGUFReader(path).tensors
    return {t.name: Tensor(t.tensor_type.name, tuple(map(int, t.shape)), t.data.tobytes()) for t in found}


def metadata(path: Path) -> dict[str, Value]:
    """Every key of a file but the header's own counts, read by gguf-py."""
    fields = gguf.GGUFReader(path).fields
    return {
        key: (tuple(kind.name for kind in field.types), field.contents())
        for key, field in fields.items()
        if not key.startswith("GGUF.")
    }


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, str]:
    """Tensors that are not the same in both, with what sets them apart; empty when all is equal."""
    said: dict[str, str] = {}
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if name not in ours or name not in theirs:
            said[name] = "only theirs" if name in theirs else "only ours"
            continue
        one, other = ours[name], theirs[name]
        if (one.type, one.shape) != (other.type, other.shape):
            said[name] = f"{one.type} {one.shape}, theirs {other.type} {other.shape}"
        elif one.data != other.data:
            pair = [np.frombuffer(each.data, dtype=np.uint8) for each in (one, other)]
            said[name] = f"{one.type}: {np.mean(pair[0] != pair[1]):.2%} of the bytes differ"
    return said


@dataclass
class LlamaCpp:
    """Results by what made them, and a folder for them."""

    folder: Path
    made: dict[tuple[object, ...], Path] = field(default_factory=dict)

    def _once(self, key: tuple[object, ...], make: Callable[[Path], None], stem: str) -> Path:
        if key not in self.made:
            place = self.folder / str(len(self.made))
            place.mkdir()
            make(place / stem)
            self.made[key] = place / stem
        return self.made[key]

    def convert(self, hf: Path, outtype: str, *, pre: str | None = None) -> Path:
        """The language model of an `hf` folder by convert_hf_to_gguf.py.

        `pre` names the pre-tokenizer of a tokenizer that it does not know.
        """

        def make(file: Path) -> None:
            _run(_conversion(hf, outtype, pre, file))

        return self._once(("convert", hf, outtype, pre), make, f"theirs-{outtype}.gguf")

    def refusal(self, hf: Path, outtype: str, *, pre: str | None = None) -> str:
        """What their converter dies of."""
        command = _conversion(hf, outtype, pre, self.folder / "refused.gguf")
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ})
        assert done.returncode != 0, command
        return done.stderr.strip().splitlines()[-1]

    def quantize(self, file: Path, outtype: str) -> Path:
        """A float file by llama-quantize."""

        def make(out: Path) -> None:
            _run([program("runtime/stock/llama-quantize"), file, out, outtype.upper(), "2"])

        return self._once(("quantize", file, outtype), make, f"theirs-{outtype}.gguf")

    def ask(self, runtime: str = "stock", **tasks: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Run tasks of run_llama_cpp.py; a task's array NAME.npy comes back as its `array`."""
        program("runtime/stock/llama-quantize")
        place = self.folder / f"ask-{len(list(self.folder.glob('ask-*')))}"
        place.mkdir()
        plain = {name: {k: _plain(v) for k, v in task.items()} for name, task in tasks.items()}
        job = {"runtime": runtime, "folder": str(place), "tasks": plain}
        found = in_peer(ENVIRONMENT, "run_llama_cpp.py", job, place)
        for name in found:
            if (place / f"{name}.npy").is_file():
                found[name]["array"] = np.load(place / f"{name}.npy")
        return found


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def program(path: str) -> Path:
    program = PEERS / ENVIRONMENT / path
    if not program.is_file():
        pytest.skip(f"no {ENVIRONMENT} here: `make peers` builds it")
    return program


def _conversion(hf: Path, outtype: str, pre: str | None, file: Path) -> list[str | Path]:
    command: list[str | Path] = [program("bin/python"), SCRIPTS / "convert_hf.py", *(["--pre", pre] if pre else [])]
    return [*command, hf, "--outtype", outtype, "--outfile", file]


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, f"{command}:\n{done.stdout[-1500:]}\n{done.stderr[-4000:]}"


def llm_file(folder: Path, outtype: str) -> Path:
    """The language model of one type in a folder that we wrote."""
    found = [file for file in folder.glob(f"*-{outtype}.gguf") if not file.stem.endswith(f"-mmproj-{outtype}")]
    assert len(found) == 1, sorted(folder.iterdir())
    return found[0]


def mmproj_file(folder: Path, outtype: str) -> Path:
    """The tower and projector of one type in a folder that we wrote."""
    found = list(folder.glob(f"*-mmproj-{outtype}.gguf"))
    assert len(found) == 1, sorted(folder.iterdir())
    return found[0]
