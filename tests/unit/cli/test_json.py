"""`--json`: the real output of every command is as its schema says, errors included."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import llava_convert
from llava_convert.cli import app
from llava_convert.layouts.info import LAYOUTS
from tests.mmbench_files import questions, write_tsv
from tests.unit.cli.test_help import COMMANDS

SCHEMAS = Path(llava_convert.__file__).resolve().parents[1] / "docs" / "schemas"


def closed(about: Any) -> Any:
    """A schema in which a key that it does not describe is an error, all the way down."""
    if isinstance(about, list):
        return [closed(one) for one in about]
    if not isinstance(about, dict):
        return about
    found = {key: closed(value) for key, value in about.items()}
    return {"additionalProperties": False, **found} if isinstance(found.get("properties"), dict) else found


def checked(name: str, text: str) -> Any:
    """The one object that a command printed, held to the published schema."""
    value, about = json.loads(text), json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(about)
    jsonschema.validate(value, closed(about), cls=jsonschema.Draft202012Validator)
    assert value["schema"] == 1 and value["seconds"] >= 0
    return value


def run(*arguments: str | Path, code: int = 0) -> str:
    found = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert found.exit_code == code, found.output
    return found.stdout


def test_every_command_has_a_schema() -> None:
    conversions = {*LAYOUTS, "convert", "merge"}
    told = {name.replace(" ", "-") for name in set(COMMANDS) - conversions} | {"convert", "error"}
    assert {path.stem for path in SCHEMAS.iterdir()} == told


def test_a_key_that_is_not_described_is_found() -> None:
    """So that the other tests here can fail."""
    right = {"schema": 1, "command": "inspect", "seconds": 0.1, "error": "x", "hint": None, "exit_code": 3}
    checked("error", json.dumps(right))
    for wrong in ({**right, "more": 1}, {**right, "exit_code": "3"}, {k: v for k, v in right.items() if k != "hint"}):
        with pytest.raises(jsonschema.ValidationError):
            checked("error", json.dumps(wrong))


@pytest.mark.parametrize("to", ["xtuner", "official", "hf", "gguf"])
def test_conversions(tiny: Path, tmp_path: Path, to: str) -> None:
    planned = checked("convert", run("pth", tiny / "iter_2.pth", "--to", to, "-o", tmp_path / "o", "--dry-run"))
    made = checked("convert", run("pth", tiny / "iter_2.pth", "--to", to, "-o", tmp_path / "o"))
    assert (planned["done"], made["done"], made["command"]) == (False, True, "convert")
    assert (made["layout"], made["to"], made["out"]) == ("pth", to, str(tmp_path / "o"))
    differ = {"done": True, "seconds": 0, "disk_free": 0}
    assert planned["disk_free"] > 0 and {**planned, **differ} == {**made, **differ}
    written = {p.relative_to(tmp_path / "o").as_posix(): p for p in (tmp_path / "o").rglob("*") if p.is_file()}
    assert {file["name"]: file["bytes"] for file in made["files"]} == {n: p.stat().st_size for n, p in written.items()}
    assert made["bytes"] == sum(file["bytes"] for file in made["files"])
    assert made["tensors"] == sum(file["tensors"] or 0 for file in made["files"])
    found = checked("inspect", run("inspect", tmp_path / "o"))
    assert (found["source"], found["layout"]) == (str(tmp_path / "o"), to)
    verdict = checked("verify", run("verify", tiny / "iter_2.pth", tmp_path / "o"))
    assert (verdict["layout"], verdict["to"], verdict["same"]) == ("pth", to, True)


def test_a_source_of_which_something_is_left(tiny: Path, tmp_path: Path) -> None:
    """What is left behind is named, with the reason, as conversion.json has it."""
    run("pth", tiny / "iter_2.pth", "--to", "hf", "-o", tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    name = "vision_tower.vision_model.embeddings.position_ids"
    save_file(weights | {name: torch.arange(4)[None]}, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    value = checked("convert", run("hf", tmp_path / "hf", "--to", "official", "-o", tmp_path / "o"))
    record = json.loads((tmp_path / "o" / "conversion.json").read_text(encoding="utf-8"))
    assert (
        value["dropped"] == record["dropped"] and value["dropped"][0]["name"] == name and value["dropped"][0]["reason"]
    )


def test_models_that_differ(tiny: Path, tmp_path: Path) -> None:
    run("pth", tiny / "iter_2.pth", "--to", "hf", "-o", tmp_path / "o")
    weights = tmp_path / "o" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    config = json.loads((tmp_path / "o" / "config.json").read_text(encoding="utf-8"))
    config["vision_feature_layer"] = -1
    (tmp_path / "o" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    verdict = checked("verify", run("verify", tiny / "iter_2.pth", tmp_path / "o", code=7))
    assert verdict["same"] is False and len(verdict["different"]) == 1 and verdict["facts"]


def test_doctor(tiny: Path, tmp_path: Path) -> None:
    run("pth", tiny / "iter_2.pth", "--to", "hf", "-o", tmp_path / "o")
    assert checked("doctor", run("doctor", tmp_path / "o", "--for", "vllm"))["sound"] is True
    (tmp_path / "o" / "processor_config.json").unlink()
    found = checked("doctor", run("doctor", tmp_path / "o", "--for", "vllm", code=7))
    assert [t["rule"] for t in found["troubles"]] == ["processor"] and found["backup"] is None
    assert checked("doctor", run("doctor", tmp_path / "o", "--for", "vllm", "--fix"))["changed"] == [
        "processor_config.json"
    ]


@pytest.mark.slow
def test_asking(tiny: Path, tmp_path: Path) -> None:
    reply = checked("chat", run("chat", tiny / "iter_2.pth", "What?", "--image", tiny / "picture.png"))
    assert (reply["layout"], reply["runtime"], reply["prompt"]) == ("pth", "transformers", "What?")
    data, words = write_tsv(tmp_path / "dev.tsv", questions()), ("--max-new-tokens", "4", "--work-dir", tmp_path / "w")
    found = checked("eval-mmbench", run("eval", "mmbench", tiny / "iter_2.pth", "--data", data, *words))
    assert (found["questions"], found["out"]) == (len(questions()), str(tmp_path / "w")) and set(found["scores"]) >= {
        "Average",
        "AR",
    }
    error = checked("error", run("chat", tiny / "iter_2.pth", code=2))
    assert error["hint"] == "give the PROMPT after the source"


def test_layouts() -> None:
    value = checked("layouts", run("layouts"))
    assert set(value["targets"]) == {"pth", "xtuner", "official", "hf", "peft", "gguf"}
    assert value["families"]["llama"]["as"]


def test_training_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    planned = checked("train", run("train", "tiny-shapes", "--dry-run"))
    assert planned["done"] is False and planned["out"] is None and planned["stages"][0]["steps"] > 0
    run("train", "tiny-shapes", "--dry-run", "--deepspeed", "zero9", code=2)
    listed = {one["name"]: one for one in checked("train", run("train", "--list"))["recipes"]}
    assert (listed["tiny-shapes"]["stage"], listed["tiny-shapes"]["memory"]) == ("1 and 2", "small")
    assert listed["llava_internlm2_chat_20b_clip_vit_large_p14_336_e1_gpu8_finetune"]["memory"] == "memory unknown"
    checked("data-check", run("data", "check", "tiny-shapes"))
    missing = checked("data-check", run("data", "check", "llava_v15_7b_finetune", code=3))
    assert missing["sets"][0]["problem"]
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(b"x")
    assert checked("data-fix-ocrvqa", run("data", "fix-ocrvqa", tmp_path / "pictures"))["copied"] == 1


def test_a_release_that_is_planned(tiny: Path, tmp_path: Path) -> None:
    value = checked("release", run("release", tiny / "iter_2.pth", "--name", "me/x", "-o", tmp_path / "r", "--dry-run"))
    assert [one["layout"] for one in value["layouts"]] == ["xtuner", "official", "hf", "gguf"]
    assert all(one["bytes"] == sum(file["bytes"] for file in one["files"]) for one in value["layouts"])


def printed(*arguments: str, **options: Any) -> tuple[int, Mapping[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "llava_convert", *arguments, "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, checked("error", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "code", "command"),
    [
        (["pth", "x"], 2, None),
        (["pth", "x", "--to", "hf", "--nothing"], 2, None),
        (["nothing"], 2, None),
        (["inspect", "absent"], 3, "inspect"),
        (["pth", "absent", "--to", "pdf"], 2, "convert"),
        (["upload", "absent", "me/x"], 3, "upload"),
        (["release", "absent", "--name", "x"], 2, "release"),
        (["train", "absent.toml"], 3, "train"),
        (["data", "check", "absent.toml"], 3, "data check"),
    ],
)
def test_errors(tmp_path: Path, arguments: list[str], code: int, command: str | None) -> None:
    status, value = printed(*arguments, cwd=tmp_path)
    assert (status, value["exit_code"], value["command"]) == (code, code, command)


def test_a_bug_is_an_object(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import llava_convert.app.inspect as inspect\ninspect._inspect = lambda *_: 1 / 0\n"
    )
    where = os.pathsep.join([str(tmp_path), str(SCHEMAS.parents[1])])
    status, value = printed("inspect", "x", cwd=tmp_path, env=os.environ | {"PYTHONPATH": where})
    assert (status, value["exit_code"]) == (1, 1) and "ZeroDivisionError" in value["error"]


@pytest.mark.slow
def test_an_interruption_is_an_object(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import time\nimport llava_convert.app.inspect as inspect\n"
        "def wait(*_):\n    open('ready', 'w').close()\n    time.sleep(60)\ninspect._inspect = wait\n"
    )
    where = os.pathsep.join([str(tmp_path), str(SCHEMAS.parents[1])])
    running = subprocess.Popen(
        [sys.executable, "-m", "llava_convert", "inspect", "x", "--json"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": where},
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "ready").exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    text, _ = running.communicate(timeout=60)
    assert running.returncode == checked("error", text)["exit_code"] == 130
