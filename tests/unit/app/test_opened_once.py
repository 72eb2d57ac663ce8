"""Each file of a source, of an output and of a base is opened once for what it says, whatever is asked of it."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import llava_convert

# Who opens files for another purpose than to read what they say: to move weights, to tell whether a file was changed.
_OTHERWISE = ("storage/ranges.py", "storage/fingerprints.py")
_counting: list[tuple[Path, Counter[str]]] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if event != "open" or not _counting or not isinstance(arguments[0], str | bytes | os.PathLike):
        return
    root, counts = _counting[-1]
    path = os.fsdecode(arguments[0])
    if not path.startswith(f"{root}/"):
        return
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_OTHERWISE):
            return
        frame = frame.f_back  # type: ignore[assignment]
    counts[os.path.relpath(path, root)] += 1


@functools.cache  # there is no way to take a hook off, and a process of pytest-xdist may make these fixtures twice
def _add_hook() -> None:
    sys.addaudithook(_hook)


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in every layout, `NAME/`, and its bases; the .pth is `pth/iter_2.pth`."""
    root = tmp_path_factory.mktemp("models").resolve()
    (root / "pth").mkdir()
    shutil.copy(tiny / "iter_2.pth", root / "pth")
    for name in ("llm", "vit"):
        shutil.copytree(tiny / name, root / name)
    bases = {"llm": str(root / "llm"), "visual_encoder": str(root / "vit")}
    for to in ("xtuner", "official", "hf", "gguf"):
        llava_convert.convert(root / "pth" / "iter_2.pth", to=to, out=root / to, max_shard_size="100kB", **bases)
    _add_hook()
    return root


def opened(root: Path, action: Callable[[], object]) -> Counter[str]:
    """How often each file under `root` is opened for what it says."""
    _counting.append((root, Counter()))
    try:
        action()
    finally:
        _, counts = _counting.pop()
    return counts


# A file is first looked at for what it is: its first bytes. The header is read later.
_LOOKED_AT = {"pth": {"pth/iter_2.pth"}, "gguf": {"gguf/gguf-f16-00001-of-00003.gguf", "gguf/gguf-mmproj-f16.gguf"}}


@pytest.mark.parametrize("layout", ["pth", "xtuner", "official", "hf", "gguf"])
@pytest.mark.parametrize("verb", ["convert", "dry run", "inspect", "verify"])
def test_once(layout: str, verb: str, models: Path, tmp_path: Path) -> None:
    source = models / layout / ("iter_2.pth" if layout == "pth" else "")
    to = "official" if layout == "hf" else "hf"
    more = {"pth": ("llm", "vit"), "xtuner": ("vit",)}.get(layout, ())
    bases = {{"llm": "llm", "vit": "visual_encoder"}[name]: str(models / name) for name in more}
    actions: dict[str, Callable[[], object]] = {
        "convert": lambda: llava_convert.convert(source, to=to, out=tmp_path / "out", **bases),
        "dry run": lambda: llava_convert.convert(source, to=to, out=tmp_path / "out", dry_run=True, **bases),
        "inspect": lambda: llava_convert.inspect(source, **bases),
        "verify": lambda: llava_convert.verify(source, models / to, **bases),
    }
    counts = opened(models, actions[verb])
    weights = [
        name for name in counts if name.startswith(f"{layout}/") and name.endswith((".safetensors", ".pth", ".gguf"))
    ]
    assert weights, f"nothing was counted: {counts}"
    allowed = _LOOKED_AT.get(layout, set())
    assert {name: n for name, n in counts.items() if n > (2 if name in allowed else 1)} == {}
