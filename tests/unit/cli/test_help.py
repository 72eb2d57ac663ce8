"""The command line: all has help and a line of docs; stdout is data, stderr is talk; nothing heavy is imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import llava_convert
from llava_convert.cli import app
from llava_convert.cli._commands import COMMANDS as TABLE
from llava_convert.layouts.info import LAYOUTS, TARGETS

ROOT = Path(llava_convert.__file__).resolve().parents[1]
WHOLE: dict[str, Any] = {name: one.whole(name) for name, one in TABLE.items()}
# `data check` and its like by both words.
COMMANDS: Mapping[str, Any] = {
    name: command
    for first, group in WHOLE.items()
    for name, command in (
        [(f"{first} {second}", c) for second, c in group.commands.items()]
        if hasattr(group, "commands")
        else [(first, group)]
    )
}
OPTIONS = sorted({o for c in COMMANDS.values() for p in c.params for o in p.opts if o.startswith("--")})
JOBS = "llava_convert.app.jobs"  # what the commands can be told, which --help of all does not say
HEAVY = ("torch", "transformers", "numpy", "peft", "huggingface_hub", "safetensors", "gguf", "pydantic", JOBS)


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)], prog_name="llava-convert")


def modules(folder: Path, *arguments: str | Path) -> set[str]:
    """Which of the heavy modules a command leaves imported, in a process of its own."""
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print(*(m for m in {HEAVY!r} if m in sys.modules), file=open('modules', 'w')))\n"
        "from llava_convert.cli import main\nmain()"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set((folder / "modules").read_text().split())


def documents() -> str:
    return "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))


# --- help and docs


def test_the_commands() -> None:
    assert set(COMMANDS) == {
        *LAYOUTS, "convert", "merge", "inspect", "verify", "layouts", "chat", "doctor", "eval mmbench", "eval tasks",
        "eval compare", "train", "data check", "data fix-ocrvqa", "upload", "release", "sweep",
    }  # fmt: skip


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_and_option_has_help(command: str) -> None:
    found = run(*command.split(), "--help")
    assert found.exit_code == 0
    assert found.stderr == ""
    assert f"llava-convert {command}" in found.stdout or f"{command} [OPTIONS]" in found.stdout
    assert COMMANDS[command].help
    for param in COMMANDS[command].params:
        assert param.help, f"{command} {param.name}" if param.name != "source" else ""


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_is_documented(command: str) -> None:
    assert re.search(rf"llava-convert {command}\b", documents()), f"no page shows `llava-convert {command}`"


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_documented(option: str) -> None:
    named = {"--out": "-o", "--help": "--help"}.get(option, option)
    assert re.search(rf"(?<![\w-]){re.escape(named)}(?![\w-])", documents()), f"no page names {option}"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_talks_as_asked(command: str) -> None:
    options = {o for p in COMMANDS[command].params for o in p.opts}
    assert {"--json", "--quiet", "--verbose"} <= options


def test_short_help() -> None:
    assert run("-h").stdout == run("--help").stdout
    assert "Convert LLaVA checkpoints" in run().output


def test_version() -> None:
    found = run("--version")
    assert (found.exit_code, found.stdout, found.stderr) == (0, f"llava-convert {llava_convert.__version__}\n", "")


# --- stdout and stderr


@pytest.mark.slow
def test_json_of_a_conversion(tiny: Path, tmp_path: Path) -> None:
    found = run("pth", tiny / "iter_2.pth", "--to", "hf", "-o", tmp_path / "o", "--json")
    assert found.exit_code == 0
    value = json.loads(found.stdout)
    assert (value["done"], value["tensors"], value["layout"], value["to"]) == (True, 80, "pth", "hf")
    assert "merged LoRA into 18 modules" in found.stderr


def test_json_of_the_others(tiny: Path, tmp_path: Path) -> None:
    run("pth", tiny / "iter_2.pth", "--to", "official", "-o", tmp_path / "o")
    looked = json.loads(run("inspect", tmp_path / "o", "--json").stdout)
    assert looked["layout"] == "official" and looked["targets"]["hf"] == {"possible": True, "missing": None}
    compared = json.loads(run("verify", tiny / "iter_2.pth", tmp_path / "o", "--json").stdout)
    assert (compared["same"], compared["equal"], compared["missing"]) == (True, 80, [])
    known = json.loads(run("layouts", "--json").stdout)
    assert "q4_k_m" in known["outtypes"] and "llama3_chat" in known["templates"] and "tiny-shapes" in known["recipes"]
    assert [one["name"] for one in known["quantizations"] if one["becomes_floats"]] == ["compressed-tensors", "FP8"]
    assert set(known["sources"]) == set(LAYOUTS) and known["targets"] == list(TARGETS)
    assert known["ops"] == [
        "copy", "cast", "merge_lora", "pad_rows", "take_rows", "rope_permute", "join", "part", "quantize", "dequantize",
        "dequantize_fp8", "plus", "constant", "set_rows",
    ]  # fmt: skip
    clip = {"part": "vision_tower", "model_types": ["clip_vision_model"], "as": [], "called": {"gguf": "clip"}}
    assert known["families"]["clip"] == clip
    assert known["families"]["phi3"]["as"] == ["llama"] and known["families"]["siglip"]["called"] == {"gguf": "clip"}
    assert set(known["sources"]["hf"]) == {"classic", "new", "flat", "newflat", "doubled", "tinyllava"}


def test_layouts_are_columns_for_people() -> None:
    blocks = [block.splitlines() for block in run("layouts").stdout.strip().split("\n\n")]
    heads = ["LAYOUT", "FAMILY", "--OUTTYPE", "QUANTISED BY", "PROMPT TEMPLATE", "RECIPE"]
    assert [re.split("  +", block[0])[0] for block in blocks] == heads
    for head, *rows in blocks:
        second = head.index(re.split("  +", head)[1])
        assert rows and all(row[second - 2 : second] == "  " and row[second] != " " for row in rows)


def test_people_get_lines(tiny: Path, tmp_path: Path) -> None:
    found = run("convert", tiny / "iter_2.pth", "--to", "hf", "-o", tmp_path / "o")
    assert f"{tmp_path / 'o'}: hf, 80 tensors, float16" in found.stdout
    assert "base, LoRA merged into 18 tensors" in found.stdout
    assert "next, in Python: from transformers " in found.stderr and "next" not in found.stdout
    assert "can become:" in run("inspect", tmp_path / "o").stdout
    assert "the same: 80 tensors equal bit for bit" in run("verify", tiny / "iter_2.pth", tmp_path / "o").stdout


def test_quiet_prints_nothing(tiny: Path, tmp_path: Path) -> None:
    ids = ["--llm-id", "org/llm", "--visual-encoder-id", "org/vit"]
    found = run("pth", tiny / "iter_2.pth", "--to", "hf", "-o", tmp_path / "o", "--quiet", *ids)
    assert (found.exit_code, found.output) == (0, "")
    assert (tmp_path / "o" / "config.json").is_file()
    for command in (["inspect", tmp_path / "o"], ["verify", tiny / "iter_2.pth", tmp_path / "o"], ["layouts"]):
        assert run(*command, "-q").stdout == ""


@pytest.mark.slow
def test_quiet_still_warns(tiny: Path, tmp_path: Path) -> None:
    run("pth", tiny / "iter_2.pth", "--to", "official", "-o", tmp_path / "official")
    config = json.loads((tmp_path / "official" / "config.json").read_text()) | {"unfreeze_mm_vision_tower": False}
    (tmp_path / "official" / "config.json").write_text(json.dumps(config))
    found = run("official", tmp_path / "official", "--to", "hf", "-o", tmp_path / "o", "--quiet")
    assert found.stdout == ""
    assert found.stderr and all(line.startswith("warning: ") for line in found.stderr.splitlines())


def test_dry_run(tiny: Path, tmp_path: Path) -> None:
    found = run("pth", tiny / "iter_2.pth", "--to", "hf", "-o", tmp_path / "o", "--dry-run", "--verbose")
    assert found.exit_code == 0 and list(tmp_path.iterdir()) == []
    assert "80 tensors" in found.stdout and "model.safetensors" in found.stdout
    assert "merge_lora → cast" in found.stdout
    assert re.search(r"^  README\.md +[\d.]+ kB$", found.stdout, re.M)
    assert re.search(r"^  conversion\.json +[\d.]+ kB$", found.stdout, re.M)
    assert re.search(
        r"^disk 488\.\d kB of [\d.]+ [GT]B free, memory about [\d.]+ MB, time about 1 s$", found.stdout, re.M
    )
    assert "nothing was written (--dry-run)" in found.stderr
    value = json.loads(run("pth", tiny / "iter_2.pth", "--to", "hf", "--dry-run", "--json").stdout)
    assert value["done"] is False


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["pth", "{tiny}/iter_2.pth"], 2, "--to"),
        (["pth", "{tiny}/iter_2.pth", "--to", "pdf"], 2, "--to pdf"),
        (["pth", "{tiny}/iter_2.pth", "--to", "hf", "--dtype", "int8"], 2, "--dtype int8"),
        (["pth", "{tiny}/iter_2.pth", "--to", "hf", "--verify", "maybe"], 2, "--verify maybe"),
        (["pth", "{tiny}/iter_2.pth", "--to", "hf", "--image-processor", "x"], 2, "--image-processor x"),
        (["pth", "{tiny}/iter_2.pth", "--to", "hf", "--threads", "-1"], 2, "threads"),
        (["pth", "{tiny}/iter_2.pth", "--to", "hf", "--lora-alpha", "nan"], 2, "--lora-alpha"),
        (["pth", "{tiny}/absent.pth", "--to", "hf"], 3, "does not exist"),
        (["pth", "{tiny}/iter2.pth", "--to", "hf"], 3, "/iter_2.pth? Else give a file"),
        (["pth", "{tiny}/iter_2.pth", "--to", "vlm"], 2, "did you mean vllm?"),
        (["pth", "{tiny}/iter_2.pth", "--to", "hf", "--dtype", "float61"], 2, "did you mean float16?"),
        (["pth", "{tiny}/iter_2.pth", "--to", "gguf", "--outtype", "q4_km"], 2, "did you mean q4_k_m?"),
        (["doctor", "{tiny}/llm", "--for", "vlm"], 2, "did you mean vllm?"),
        (["inspct", "{tiny}/iter_2.pth"], 2, "error: No such command 'inspct'. Did you mean 'inspect'?"),
        (["verify", "--jsn"], 2, "llava-convert verify --help` lists arguments and options"),
        (["hf", "{tiny}/iter_2.pth", "--to", "official"], 4, "is not of the hf layout but pth"),
        (["convert", "{tiny}/picture.png", "--to", "hf"], 4, "is a picture"),
        (["inspect", "{tiny}/empty"], 3, "does not exist"),
    ],
)
def test_errors(tiny: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    filled = [argument.replace("{tiny}", str(tiny)) for argument in arguments]
    out = ["-o", tmp_path / "o"] if "--to" in filled else []
    found = run(*filled, *out)
    assert (found.exit_code, found.stdout) == (code, "")
    assert message in found.stderr and "Traceback" not in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_json_of_an_error(tmp_path: Path) -> None:
    found = run("inspect", tmp_path / "absent", "--json")
    assert found.exit_code == 3
    assert "does not exist" in json.dumps(json.loads(found.stdout))


# --- what is imported


@pytest.mark.slow
def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    assert modules(tmp_path, "pth", "--help") == {JOBS}
    assert modules(tmp_path, "--help") == set()


@pytest.mark.slow
def test_nothing_imports_torch(tiny: Path, tmp_path: Path) -> None:
    """It costs 1.3 s and 143 MB."""
    official = tmp_path / "official"
    for command in (
        ["pth", tiny / "iter_2.pth", "--to", "official", "-o", official],  # which merges a LoRA
        ["inspect", tiny / "iter_2.pth"],
        ["official", official, "--to", "hf", "-o", tmp_path / "hf"],
        ["hf", tmp_path / "hf", "--to", "official", "-o", tmp_path / "back", "--verify", "full"],
        ["pth", tiny / "iter_2.pth", "--to", "xtuner", "-o", tmp_path / "xtuner"],
    ):
        assert not modules(tmp_path, *command) & {"torch", "transformers", "peft"}, command


def test_what_computes_nothing_imports_no_numpy(tiny: Path, tmp_path: Path) -> None:
    """It costs 0.1 s. pydantic, which typer would have for words and paths, costs as much."""
    assert modules(tmp_path, "inspect", tiny) == {JOBS}


def test_options_that_nobody_gave_import_no_pydantic(tiny: Path, tmp_path: Path) -> None:
    """Numbers among them, which a conversion has: it costs 0.05 s."""
    command = ["pth", tiny / "iter_2.pth", "--to", "official", "-o", tmp_path / "out"]
    assert "pydantic" not in modules(tmp_path, *command)
    assert "pydantic" in modules(tmp_path, *command, "--force", "--threads", "1")  # typer reads what was typed


@pytest.mark.parametrize("arguments", [["inspect", "fixtures/tiny"], ["inspect", "nowhere"], ["--help"]])
def test_python_does_not_look_for_cycles_as_a_command_ends(arguments: list[str]) -> None:
    """Among the objects of a large vocabulary it takes 0.17 s."""
    code = (
        "import atexit, gc\n"
        "atexit.register(lambda: print('frozen' if gc.get_freeze_count() > 10_000 else 'looked through'))\n"
        "from llava_convert.cli import main\nmain()"
    )
    ended = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1] == "frozen"


# --- completion


def test_what_is_offered_is_what_there_is() -> None:
    from llava_convert.app.jobs.convert import ConvertJob
    from llava_convert.core.flags import options_of
    from llava_convert.layouts.gguf.mixes import OUTTYPES
    from llava_convert.model.checkpoint import PART_WORDS

    options = options_of(ConvertJob)
    assert set(options["part"].flag.choices) == {"all", *PART_WORDS.values()}
    assert set(options["outtype"].flag.offers) | set(options["mmproj_outtype"].flag.offers) <= {"auto", *OUTTYPES}


# --- the options of a conversion


def test_a_command_shows_what_its_source_can_use() -> None:
    shown = {layout: run(layout, "--help").stdout for layout in LAYOUTS}
    for option in ("--config ", "--pretrained-pth"):
        assert {layout for layout, text in shown.items() if option in text} == {"pth", "xtuner"}
    assert {layout for layout, text in shown.items() if "--config-from" in text} == {"official", "hf"}
    assert {layout for layout, text in shown.items() if "--mmproj " in text} == {"gguf"}
    assert {layout for layout, text in shown.items() if "--dequantize" in text} == {"official", "hf", "gguf"}
    assert {layout for layout, text in shown.items() if "--lora-alpha" in text} == set(LAYOUTS)
    every = run("convert", "--help").stdout
    assert all(option in every for option in ("--config", "--dequantize", "--lora-alpha", "--outtype"))


def test_options_of_some_targets_stand_in_a_panel_of_theirs() -> None:
    text = run("pth", "--help").stdout
    panels = re.split(r"╭─ ", text)
    gguf = next(panel for panel in panels if panel.startswith("Output: gguf "))
    assert all(option in gguf for option in ("--outtype", "--mmproj-outtype", "--pre"))
    assert "--dtype" in next(panel for panel in panels if panel.startswith("Output: pth, xtuner, official, hf, peft"))


def test_an_option_that_the_source_never_uses_is_told_where_it_belongs(tiny: Path, tmp_path: Path) -> None:
    run("pth", tiny / "iter_2.pth", "--to", "hf", "-o", tmp_path / "hf")
    found = run("hf", tmp_path / "hf", "--to", "official", "-o", tmp_path / "o", "--config", tmp_path / "x.py")
    assert found.exit_code == 2 and "--config does not apply: hf is hf" in found.stderr
    assert "pth and xtuner" in found.stderr
