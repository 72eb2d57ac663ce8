"""The sha256 of every file that conversions of the fixtures and of the golden checkpoints write, cards and records too.

    python -m tests.golden.manifest            compare with manifest.json; exit 1 where a byte differs
    python -m tests.golden.manifest --write    take what is written now as right

A change that only moves code leaves every byte as it was, and this shows it. A change that means to alter an output
writes the manifest anew, so that the diff of manifest.json tells which files it altered. BLAS and ggml
have other kernels for other types of CPU, which may round a last bit otherwise, so that this is no test of every run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
MANIFEST = Path(__file__).with_name("manifest.json")
TINY = CHECKOUT / "fixtures" / "tiny"
GOLDEN = CHECKOUT.parent / "shared" / "golden"
LAYOUTS = ("xtuner", "official", "hf", "gguf")
PARTS = ("llm", "projector", "visual-encoder")
TYPES = ("f32", "bf16", "q8_0", "q4_0", "q4_k_m")
# A layout from itself is not converted.
_SAME = {("xtuner", "xtuner"), ("official", "official"), ("huggingface", "hf")}

Entry = dict[str, str] | str
Options = dict[str, Any]


def conversions(made: Path) -> Iterator[tuple[str, Path, Options]]:
    """Name, source and options of each conversion, in order; those of `made` become sources themselves."""
    bases: Options = {"llm": str(TINY / "llm"), "visual_encoder": str(TINY / "vit")}
    pth = TINY / "iter_2.pth"
    for to in LAYOUTS:
        yield f"tiny/pth-{to}", pth, {"to": to, **bases}
        for part in PARTS:
            used = _used_by(part, to, bases)
            yield f"tiny/pth-{to}-{part}", pth, {"to": to, "part": part, **used}
    for outtype in TYPES:
        yield f"tiny/pth-gguf-{outtype}", pth, {"to": "gguf", "outtype": outtype, **bases}
    for source in LAYOUTS:
        more = bases if source == "xtuner" else {}
        for to in LAYOUTS:
            if to != source:
                yield f"tiny/{source}-{to}", made / f"tiny/pth-{source}" / "tiny", {"to": to, **more}
    for source in sorted(found for case in GOLDEN.glob("cases/*") for found in _sources(case)):
        name = source.relative_to(GOLDEN / "cases")
        for to in LAYOUTS:
            if (name.name, to) not in _SAME:
                # Of a projector alone the xtuner layout holds no more.
                used = {} if (name.parts[0], to) == ("c_pretrain", "xtuner") else _bases(name.parts[0])
                yield f"golden/{name.as_posix()}-{to}", source, {"to": to, **used}


def _used_by(part: str, to: str, bases: Options) -> Options:
    """The bases that a part is made with; one that nothing uses would be refused."""
    if part == "projector":
        return bases if to == "official" else {}
    return {key: value for key, value in bases.items() if key == part.replace("-", "_")}


def _sources(case: Path) -> list[Path]:
    folders = [case / name for name in ("xtuner", "official", "huggingface")]
    return [*case.glob("*/iter_*.pth"), *(folder for folder in folders if folder.is_dir())]


def _bases(case: str) -> Options:
    named = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))[case]
    return {part: str((GOLDEN / named[part]).parent) for part in ("llm", "visual_encoder")}


def manifest() -> dict[str, Entry]:
    """What every conversion writes now: file → sha256, or the exit code where it is refused."""
    from llava_convert import convert
    from llava_convert.core.errors import ConvertError

    found: dict[str, Entry] = {}
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary)
        for name, source, options in conversions(made):
            out = made / name / "tiny"
            try:
                convert(source, out=out, name="tiny", **options)
            except ConvertError as problem:
                found[name] = f"exit {problem.exit_code}"
                continue
            files = (path for path in sorted(out.rglob("*")) if path.is_file())
            found[name] = {
                path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
            }
    return found


def differences(before: dict[str, Entry], now: dict[str, Entry]) -> list[str]:
    """One line for each file that is not as it was."""
    said: list[str] = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            said += [f"{name}: {file}" for file in sorted(old.keys() | new.keys()) if old.get(file) != new.get(file)]
        elif old != new:
            said.append(f"{name}: was {_word(old)}, is {_word(new)}")
    return said


def _word(entry: Entry | None) -> str:
    return "missing" if entry is None else entry if isinstance(entry, str) else f"{len(entry)} files"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--write", action="store_true", help="take what is written now as right")
    write = options.parse_args().write
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(GOLDEN)  # training configs name their bases from here
    now = manifest()
    if write:
        MANIFEST.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    said = differences(json.loads(MANIFEST.read_text(encoding="utf-8")), now)
    for line in said:
        print(line)
    files = sum(len(entry) for entry in now.values() if isinstance(entry, dict))
    print(f"{len(now)} conversions, {files} files, {len(said)} differences")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
