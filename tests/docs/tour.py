"""docs/cli-tour.md: thirty questions about a command line, each with a command and what it prints.

`python -m tests.docs.tour` runs them all and writes the page. They run in one folder, in order: later ones use what
earlier ones made.
"""

from __future__ import annotations

import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import llava_convert
from tests.hubs.huggingface import HuggingFace

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "fixtures" / "tiny"
PAGE = ROOT / "docs" / "cli-tour.md"
HEAD = """\
# What can the command line do?

Thirty questions that people ask of a converter's command line, each with a command that shows the answer. The commands
run in order in one folder: `run/iter_2000.pth` is a small checkpoint of xtuner, and `tiny/` holds its base models.
`make docs` runs them and prints what they say; long outputs are cut (`…`). All options: [commands](cli.md).
"""


@dataclass(frozen=True)
class Stop:
    """One stop of the tour. `lines` is how many lines of the output are shown; `terminal`: the command sees one."""

    question: str
    answer: str
    command: str
    lines: int = 40
    terminal: bool = False


TOUR = (
    Stop(
        "Does it detect the format?",
        "Yes, by keys and tensor names, and it says why. SOURCE may be a file, a folder, or a training's work_dir.",
        "llava-convert inspect run",
        5,
    ),
    Stop(
        "How do I choose the target?",
        "`--to` takes a layout, or the program that is to load the output.",
        "llava-convert convert run/iter_2000.pth --to vllm -o my-llava",
    ),
    Stop(
        "Is there a dry run?",
        "`--dry-run` prints every file, the disk that is free, the memory and the time. It writes nothing.",
        "llava-convert pth run/iter_2000.pth --to gguf --dry-run",
    ),
    Stop(
        "Does it show progress?",
        "A terminal has one line: `converting  model-00002-of-00004.safetensors  50%  8.0 GB/16.0 GB  400.0 MB/s  "
        "0:20  eta 0:20`. In 40 columns it is `converting   50%  400.0 MB/s  eta 0:20`. A log gets a line every 30 s. "
        "The last line has the time and the rate.",
        "llava-convert pth run/iter_2000.pth --to official -o my-official",
        terminal=True,
    ),
    Stop(
        "Is there JSON for scripts?",
        "`--json` prints one object on stdout; [its keys](json.md) have a schema. An error is an object, too.",
        "llava-convert verify run/iter_2000.pth my-llava --json | head -n 8",
    ),
    Stop(
        "What are the exit codes?",
        "One for each kind of problem ([list](errors.md)); 3 is an input that is missing or damaged.",
        'llava-convert inspect nowhere.pth; echo "exit code $?"',
    ),
    Stop(
        "Does it work in a pipe?",
        "stdout has the result, stderr has the messages. A model is a folder or a file that is read at many places, so "
        "it cannot come from stdin.",
        "llava-convert verify run/iter_2000.pth my-llava 2> messages.txt | cut -c 1-40",
    ),
    Stop(
        "Can I turn colours off?",
        "Colours appear on a terminal only. `NO_COLOR` turns them off there.",
        "NO_COLOR=1 llava-convert inspect nowhere.pth",
        terminal=True,
    ),
    Stop(
        "Is there shell completion?",
        "`llava-convert --install-completion` sets it up for bash, zsh or fish. TAB completes commands, options and "
        "their values.",
        'eval "$(llava-convert --show-completion)"; complete -p llava-convert',
    ),
    Stop(
        "Does it work offline?",
        "Yes. It uses the network only for a model that is named by a hub id or a URL: by you, or by the checkpoint, "
        "whose base model is then looked for in the hub's cache first. `HF_HUB_OFFLINE=1` forbids that as well. Here "
        "the shell has no network at all:",
        "unshare -rn llava-convert convert my-llava --to xtuner -o my-xtuner --quiet && ls my-xtuner",
    ),
    Stop(
        "Can it resume?",
        "`--resume` keeps the shards that a killed run had finished. This run goes on where a `kill -9` stopped one:",
        "llava-convert pth run/iter_2000.pth --to hf -o killed --max-shard-size 20kB --resume 2>&1 | grep finished",
    ),
    Stop(
        "Is the output atomic?",
        "The output folder appears whole or not at all. Here the system refuses files above 64 kB:",
        "(ulimit -f 64; llava-convert hf my-llava --to official -o never); ls -d never",
    ),
    Stop(
        "Does it overwrite files?",
        "Never without `--force`. With it, the old output survives any failure.",
        "llava-convert hf my-llava --to official -o my-official",
    ),
    Stop(
        "What if the input is incomplete?",
        "A damaged file, a missing shard or a missing base model is exit 3, and the message names it.",
        "head -c 100000 run/iter_2000.pth > half.pth; llava-convert pth half.pth --to hf",
    ),
    Stop(
        "Does it say “did you mean”?",
        "For commands, options, layouts, choices, recipes, and files beside the one that you named.",
        "llava-convert pth run/iter_200.pth --to vllm; llava-convert hf my-llava --to olama",
    ),
    Stop(
        "Is there a config file?",
        "No: a command line says everything, so that it can be repeated. The hubs' own variables are read (`HF_HOME`, "
        "`HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `MODELSCOPE_CACHE` …), and `--config` takes xtuner's training "
        "config, which is read and never run.",
        "HF_HUB_OFFLINE=1 llava-convert inspect hf://me/my-llava",
    ),
    Stop(
        "How quiet, how verbose?",
        "`--quiet` leaves warnings and errors. `--verbose` adds every tensor to a plan, and tracebacks to errors.",
        "llava-convert pth run/iter_2000.pth --to hf --dry-run --verbose 2>&1 | grep merge_lora | head -n 2",
    ),
    Stop(
        "How do I verify the output?",
        "`verify` compares every tensor, and what configs, tokenizer, template and processor say. It takes outputs of "
        "other converters, too.",
        "llava-convert verify run/iter_2000.pth my-llava",
    ),
    Stop(
        "Where did each tensor come from?",
        "[`conversion.json`](conversion-json.md) records the source, the byte range and the arithmetic of each tensor.",
        "head -n 8 my-llava/conversion.json",
    ),
    Stop(
        "Does it write a model card?",
        "Every output has a [README.md](cards.md) with the commands that load and serve it.",
        "grep 'vllm serve' my-llava/README.md",
    ),
    Stop(
        "Can it upload to a hub?",
        "To Hugging Face, ModelScope or both, once the output was compared with its source.",
        "llava-convert upload my-llava me/my-llava --source run/iter_2000.pth",
    ),
    Stop(
        "Can I pin a revision?",
        "`@` takes a branch, a tag or a commit.",
        "llava-convert inspect hf://me/my-llava@main 2>&1 | grep -E '^hf|next'",
    ),
    Stop(
        "Does it use the hub's cache?",
        "What is in the cache is taken from there. Else only the bytes that are needed are read from the hub; "
        "`--cache` downloads the model to the cache.",
        "llava-convert convert hf://me/my-llava --to official -o from-hub 2>&1 | grep fetched",
    ),
    Stop(
        "Where does the token go?",
        "The tool keeps none. It takes the one of the hub's own client (`hf auth login`, `HF_TOKEN`), and prints it "
        "nowhere.",
        "HF_TOKEN= llava-convert upload my-llava me/another",
    ),
    Stop(
        "How much memory does it need?",
        "A few hundred MB for any size of model ([measured](performance.md)); a plan says how much.",
        "llava-convert pth run/iter_2000.pth --to hf --dry-run 2>&1 | grep memory",
    ),
    Stop(
        "Does it use several cores?",
        "`--threads N`; the default is one a core, at most four. The bytes are the same for any number. "
        "[Many machines](scale.md) can share one output.",
        "for n in 1 4; do llava-convert pth run/iter_2000.pth --to hf -o threads/$n --name x --threads $n -q; done\n"
        "diff -r threads/1 threads/4 && echo the same bytes",
    ),
    Stop(
        "Can it quantise?",
        "To the types of GGUF, in the same pass, without a file between.",
        "llava-convert convert my-llava --to ollama --outtype q8_0 -o my-gguf",
    ),
    Stop(
        "Can I choose the size of shards?",
        "`--max-shard-size`; the default follows the source's shards.",
        "llava-convert hf my-llava --to hf --max-shard-size 200kB -o sharded --quiet; ls sharded | grep model",
    ),
    Stop(
        "Does it merge LoRA?",
        "Adapters of xtuner, peft, the LLaVA code and others are merged in float64 and rounded once.",
        "llava-convert merge base my-lora -o merged",
    ),
    Stop(
        "Which versions does it support?",
        "`layouts` lists what this version knows; `doctor` checks a folder for one version of a program.",
        "llava-convert --version; llava-convert doctor my-llava --for transformers@4.46",
    ),
)
# What differs between machines and runs, and how the page shows it.
_MASKS = (
    (r"of [\d.]+ [GT]B free", "of 68.2 GB free"),
    (r"memory about [\d.]+ MB", "memory about 60.3 MB"),
    (r"time about \d+ s", "time about 1 s"),
    (r'"seconds": [\d.]+', '"seconds": 0.412'),
    (r"in \d:\d\d \([\d.]+ [kMG]?B/s\)", "in 0:00 (9.1 MB/s)"),
    (r"took \d:\d\d", "took 0:00"),
    (r"http://127\.0\.0\.1:\d+", "https://huggingface.co"),
    (r"fetched [\d.]+ [kM]?B in \d+ requests", "fetched 445.1 kB in 18 requests"),
    (r"\d+ finished files kept, [\d,]+ bytes", "5 finished files kept, 95,232 bytes"),
)


def build(root: Path) -> None:
    """The files that the tour begins with, and a conversion that was killed."""
    for base in ("llm", "vit"):  # as the training config of iter_2.pth names them
        shutil.copytree(TINY / base, root / "tiny" / base)
    (root / "run").mkdir()
    shutil.copy(TINY / "iter_2.pth", root / "run" / "iter_2000.pth")
    source = root / "run" / "iter_2000.pth"
    llava_convert.convert(source, to="hf", out=root / "base")
    (root / "base" / "conversion.json").unlink()  # which would say that the adapter is merged already
    llava_convert.convert(source, to="peft", part="visual-encoder", out=root / "my-lora")


def kill_one(root: Path, environment: Mapping[str, str]) -> None:
    """Start the conversion that the tour resumes, and kill it once it has finished some shards."""
    command = ["pth", "run/iter_2000.pth", "--to", "hf", "-o", "killed", "--max-shard-size", "20kB"]
    # It stands still before it renames, when every shard is finished.
    code = (
        "import pathlib, time\nfrom llava_convert.storage.output.staging import Staging\n"
        "def stand(*_):\n    pathlib.Path('standing').touch()\n    time.sleep(60)\n"
        "Staging.commit = stand\nfrom llava_convert.cli import main\nmain()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, *command], cwd=root, env={**environment}, stderr=subprocess.DEVNULL
    ) as run:
        while not (root / "standing").exists():
            assert run.poll() is None
            time.sleep(0.05)
        run.kill()
    (root / "standing").unlink()


def _shell(command: str, root: Path, environment: Mapping[str, str], *, terminal: bool) -> str:
    given: dict[str, str] = {**environment}
    if not terminal:
        done = subprocess.run(
            ["bash", "-c", command], cwd=root, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        return done.stdout
    ours, theirs = pty.openpty()
    with subprocess.Popen(["bash", "-c", command], cwd=root, env=given, stdout=theirs, stderr=theirs) as run:
        os.close(theirs)
        said = b""
        with suppress(OSError):  # Linux says so where the other side is closed
            while part := os.read(ours, 65536):
                said += part
        os.close(ours)
    assert run.returncode is not None
    return said.decode().replace("\r\n", "\n")


def _on_screen(text: str) -> str:
    """The lines that stay on a terminal: some are erased, and others are written over."""
    rows, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if token == "\n":
            row, column = row + 1, 0
            rows += [""] * (row == len(rows))
        elif token == "\r":
            column = 0
        elif token.endswith("A") and token[0] == "\x1b":
            row -= int(token[2:-1] or 1)
        elif token == "\x1b[2K":
            rows[row] = ""
        elif token[0] != "\x1b":
            rows[row] = rows[row][:column].ljust(column) + token + rows[row][column + len(token) :]
            column += len(token)
    return "\n".join(rows)


def printed(root: Path) -> list[tuple[Stop, str]]:
    """Each stop with what its command prints, run in `root`."""
    (root / "bin").mkdir()
    program = root / "bin" / "llava-convert"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m llava_convert "$@"\n')
    program.chmod(0o755)
    found = []
    with HuggingFace() as hub:
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")} | hub.env
        environment |= {"PATH": f"{root / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(root)}
        environment |= {"TERM": "xterm-256color", "COLUMNS": "100", "LC_ALL": "C.UTF-8"}
        build(root)
        kill_one(root, environment)
        for stop in TOUR:
            text = _shell(stop.command, root, environment, terminal=stop.terminal)
            if "NO_COLOR" in stop.command:
                assert "\x1b[3" not in text
            text = _on_screen(text).replace(f"{root}/", "")
            for pattern, shown in _MASKS:
                text = re.sub(pattern, shown, text)
            found.append((stop, text))
    return found


def page(root: Path) -> str:
    """The page, as the commands print now, run in the empty folder `root`."""
    parts = [HEAD]
    for stop, text in printed(root):
        every = [line.rstrip() for line in text.strip("\n").splitlines()]
        shown = [*every[: stop.lines], *(["…"] if len(every) > stop.lines else [])]
        command = "\n".join(f"$ {line}" for line in stop.command.splitlines())
        block = "\n".join([command, *shown])
        answer = "\n".join(textwrap.wrap(stop.answer, 120, break_long_words=False, break_on_hyphens=False))
        parts.append(f"## {stop.question}\n\n{answer}\n\n```console\n{block}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        PAGE.write_text(page(Path(name).resolve()), encoding="utf-8")
