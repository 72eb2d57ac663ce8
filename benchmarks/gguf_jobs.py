"""GGUF beside llama.cpp's own programs, in one sitting: the same `hf` folder, the same type, the same threads.

Theirs write the language model alone, since their converter refuses a CLIP tower; ours write both files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.jobs import GB, Row, convert
from benchmarks.make import Values, made, write_json, write_official
from benchmarks.measure import Run, discard, quiesce, run, warm
from benchmarks.shapes import Shape, llama3_shape_for
from tests.peers import llama3_tokenizer

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / ".venvs"
LLAMA_CPP = VENVS / "llama.cpp"
CONVERTER = (LLAMA_CPP / "bin" / "python", ROOT / "tests" / "peers" / "convert_hf.py")
QUANTISER = LLAMA_CPP / "runtime" / "stock" / "llama-quantize"
THREADS = os.cpu_count() or 1


@dataclass(frozen=True)
class Job:
    """`through` is the type that theirs writes first and quantises from, when it cannot write the wanted one."""

    outtype: str
    budget: float
    through: str | None = None

    @property
    def name(self) -> str:
        return f"gguf-{self.outtype}"


JOBS = (Job("f16", 1 / 4), Job("bf16", 1 / 4), Job("q8_0", 1 / 4), Job("q4_k_m", 0.6, through="f16"))


def missing() -> str:
    """What to say when the peers are not here; empty when they are."""
    here = QUANTISER.is_file() and llama3_tokenizer.ranks_file(VENVS) is not None
    return "" if here else "gguf is left out: `make peers` builds llama.cpp and fetches a tokenizer"


def make_hf(folder: Path, size: float) -> None:
    """`model`: as `write_hf` makes it, with about `size` GB of language model."""
    write_hf(folder, llama3_shape_for(int(size * GB)))


def write_hf(folder: Path, shape: Shape) -> None:
    """`model`: the `hf` layout in bfloat16, one file, with Llama-3's vocabulary. It takes twice the room meanwhile."""
    official = folder / "official"
    official.mkdir()
    write_official(official, shape, "BF16", 10**15, Values("BF16"))
    _use_llama3(official, shape)
    convert(official, "hf", folder / "model", ["--visual-encoder", official / "tower", "--max-shard-size", "1000GB"])
    discard(official)


def _use_llama3(official: Path, shape: Shape) -> None:
    ranks = llama3_tokenizer.ranks_file(VENVS)
    assert ranks is not None
    tokenizer = llama3_tokenizer.read(ranks)
    tokenizer.save(str(official / "tokenizer.json"))
    write_json(
        official / "tokenizer_config.json",
        {
            "bos_token": llama3_tokenizer.BEGIN,
            "eos_token": llama3_tokenizer.END_OF_TURN,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": True,
            "model_max_length": 8192,
        },
    )
    begin, end_of_text, end_of_turn = map(
        tokenizer.token_to_id, (llama3_tokenizer.BEGIN, llama3_tokenizer.END_OF_TEXT, llama3_tokenizer.END_OF_TURN)
    )
    config = json.loads((official / "config.json").read_text())
    write_json(official / "config.json", config | {"bos_token_id": begin, "eos_token_id": end_of_text})
    stops = {"bos_token_id": begin, "eos_token_id": [end_of_text, end_of_turn]}
    write_json(official / "generation_config.json", stops)
    (official / "tower").mkdir()
    write_json(official / "tower" / "config.json", shape.tower_config())
    (official / "preprocessor_config.json").rename(official / "tower" / "preprocessor_config.json")


def theirs(job: Job, source: Path, work: Path) -> Run:
    """Their way to the type, run to its end; what it wrote is removed afterwards."""
    first = job.through or job.outtype
    floats = work / f"{first}.gguf"
    ran = run([*CONVERTER, source, "--outtype", first, "--outfile", floats])
    if job.through is not None:
        quantised = run([QUANTISER, floats, work / "out.gguf", job.outtype.upper(), str(THREADS)])
        ran = replace(
            ran,
            seconds=ran.seconds + quantised.seconds,
            user=ran.user + quantised.user,
            system=ran.system + quantised.system,
            anonymous=max(ran.anonymous, quantised.anonymous),
            resident=max(ran.resident, quantised.resident),
            temporary=floats.stat().st_size,
        )
    for file in work.glob("*.gguf"):
        file.unlink()
    return ran


def compare(job: Job, size: float, repeats: int, cache: Path) -> Row:
    """Theirs and ours, one after the other, `repeats` times, from a source in the page cache."""
    source = made(cache / f"gguf-{size:g}", make_hf, size) / "model"
    work = cache / "work"
    discard(work)
    work.mkdir()
    warm(sorted(source.glob("*.safetensors")))
    ours, others = [], []
    for _ in range(repeats):
        quiesce()
        others.append(theirs(job, source, work))
        quiesce()
        options: list[str | Path] = ["--outtype", job.outtype, "--threads", str(THREADS)]
        ours.append(convert(source, "gguf", work / "out", options, work=work))
        discard(work / "out")
    discard(work)
    yardstick = "llama.cpp" if job.through is None else f"llama.cpp by {job.through}"
    notes, what = _notes(ours, others), f"hf to gguf {job.outtype}"
    return Row(job.name, size, tuple(ours), yardstick, tuple(others), job.budget, notes, what)


def _notes(ours: list[Run], others: list[Run]) -> tuple[str, ...]:
    memory = max(r.resident for r in ours) / max(r.resident for r in others)
    spent, spent_by_them = (min(r.user + r.system for r in runs) for runs in (ours, others))
    disk, disk_of_theirs = (max(r.temporary for r in runs) / GB for runs in (ours, others))
    return (
        f"peak RSS {memory:.2f} of theirs",
        f"processor {spent:.1f} s, theirs {spent_by_them:.1f} s",
        f"temporary disk {disk:.2f} GB, theirs {disk_of_theirs:.2f} GB",
    )


def planned(
    names: list[str], sizes: list[float], repeats: int, cache: Path
) -> list[tuple[str, Callable[[], list[Row]]]]:
    """What to run, in order, each with its name: `gguf` is all of it, `gguf-q8_0` one job."""
    return [
        (f"{job.name} {size:g} GB", lambda job=job, size=size: [compare(job, size, repeats, cache)])  # type: ignore[misc]
        for size in sizes
        for job in JOBS
        if "gguf" in names or job.name in names
    ]
