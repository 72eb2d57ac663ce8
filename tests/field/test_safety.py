"""What strangers' files and unlucky machines do: the right exit code, no traceback, and nothing of it in OUT."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import llava_convert
from llava_convert.core.errors import InputError, OutputError, UsageError
from llava_convert.core.tensors import MAX_TENSORS
from tests.field.conftest import Models

COMMAND = (sys.executable, "-m", "llava_convert")
linux = pytest.mark.skipif(sys.platform != "linux", reason="/dev/full, or names that are no UTF-8")


def edited(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def holding(folder: Path, text: str) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def ran(*words: object, **settings: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, check=False, **settings)


# Cards and names.


@pytest.mark.parametrize(
    "value",
    ["!!bool foo", "!!timestamp abc", "!!int ''", "!!python/name:os.system", "{[1]: 2}", "&a [*a]", '"\\uD800"'],
)
def test_yaml_of_a_card_is_text_or_left(models: Models, tmp_path: Path, value: str) -> None:
    model = models.copy("hf", tmp_path / "m")
    (model / "README.md").write_text(f"---\nlicense: {value}\nlanguage: no\n---\n")
    llava_convert.convert(model, to="official", out=tmp_path / "out")
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.license in (None, "foo", "abc")  # no object, and nothing that YAML can call


def test_a_language_is_text(models: Models, tmp_path: Path) -> None:
    """`no` is Norwegian on the hub, and false in YAML."""
    model = models.copy("hf", tmp_path / "m")
    (model / "README.md").write_text("---\nlanguage: [no, en]\n---\n")
    llava_convert.convert(model, to="official", out=tmp_path / "out")
    assert 'language:\n- "no"\n- en\n' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("end", [")![x](https://evil.example/p.png", "](https://evil.example)", "*b*", "<img src=x>"])
def test_a_link_of_a_card_is_no_markdown(models: Models, tmp_path: Path, end: str) -> None:
    model = models.copy("hf", tmp_path / "m")
    front = {"license": "other", "license_name": "x", "license_link": f"https://a.b/x{end}"}
    (model / "README.md").write_text(f"---\n{json.dumps(front)}\n---\n")
    llava_convert.convert(model, to="official", out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "evil.example" not in card and "<img" not in MarkdownIt().render(card)


@pytest.mark.parametrize("name", ["../../x", "a/b", "/abs", "./x", "a\\b", "..", " ", "a\nb", "a\x1b[2J"])
@pytest.mark.parametrize("to", ["gguf", "hf"])
def test_a_name_is_no_path(models: Models, tmp_path: Path, name: str, to: str) -> None:
    with pytest.raises(UsageError, match="give a name, not a path"):
        llava_convert.convert(models.pth, to=to, out=tmp_path / "out", name=name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path", ["C:\\Users\\somebody\\llm", "\\\\somebody\\share\\llm", "/home/somebody/llm", "D:/somebody/llm"]
)
@pytest.mark.parametrize("to", ["official", "gguf", "xtuner"])
def test_no_local_path_reaches_an_output(models: Models, tmp_path: Path, path: str, to: str) -> None:
    model = models.copy("hf", tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["_name_or_path"] = path
    edited(model / "config.json", **config)
    edited(model / "generation_config.json", _name_or_path=path)
    llava_convert.convert(model, to=to, out=tmp_path / "out")
    assert holding(tmp_path / "out", "somebody") == []


@pytest.mark.parametrize("layout", ["hf", "official", "xtuner"])
@pytest.mark.parametrize("to", ["hf", "official", "xtuner", "gguf"])
def test_code_that_a_config_asks_for_is_in_no_output(models: Models, tmp_path: Path, layout: str, to: str) -> None:
    model = models.copy(layout, tmp_path / "m")
    code = {"auto_map": {"AutoTokenizer": ["evil_code.T", None]}}
    also = {"generation_config.json": {"custom_generate": "evil_code/generate.py"}}
    for name in ("tokenizer_config.json", "generation_config.json", "preprocessor_config.json"):
        for path in model.rglob(name):
            edited(path, **code, **also.get(name, {}))
    bases = {"llm": str(models.pth.parent / "llm"), "visual_encoder": str(models.pth.parent / "vit")}
    more: dict[str, Any] = {"dtype": "float32"} if layout == to else {}
    if layout == "xtuner":
        more |= bases
    llava_convert.convert(model, to=to, out=tmp_path / "out", **more)
    assert holding(tmp_path / "out", "evil_code") == []


# The machine.


@linux
@pytest.mark.parametrize("verb", ["pth", "verify", "inspect"])
def test_the_current_folder_is_gone(models: Models, tmp_path: Path, verb: str) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    bases = ("--llm", models.pth.parent / "llm", "--visual-encoder", models.pth.parent / "vit")
    words = {"pth": ("--to", "hf", "-o", tmp_path / "out"), "verify": (models["hf"],), "inspect": ()}[verb]
    script = f'cd "{gone}" && rmdir "{gone}" && exec "$@"'
    command = ["sh", "-c", script, "sh", *COMMAND, verb, models.pth, *words, *bases]
    python_path = os.pathsep.join(path for path in sys.path if path)
    env = {**os.environ, "PYTHONPATH": python_path}
    found = subprocess.run([*map(str, command)], capture_output=True, check=False, env=env)
    assert found.returncode == 0, found.stderr.decode()


@linux
def test_a_name_that_is_no_text(models: Models, tmp_path: Path) -> None:
    llava_convert.convert(models.pth, to="gguf", out=tmp_path / os.fsdecode(b"\xff"))
    (out,) = tmp_path.iterdir()
    assert llava_convert.verify(models.pth, out)


@linux
def test_stderr_on_a_full_disk(models: Models, tmp_path: Path) -> None:
    words = ["pth", models.pth, "--to", "hf", "-o", tmp_path / "out"]
    with Path("/dev/full").open("wb") as full:
        found = subprocess.run([*COMMAND, *map(str, words)], stderr=full, stdout=subprocess.PIPE, check=False)
    assert found.returncode == 0 and llava_convert.verify(models.pth, tmp_path / "out")


def test_no_thread_can_be_started(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(OutputError, match="no further thread"):
        llava_convert.convert(models.pth, to="hf", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"]
)
def test_stat_fails(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    model, real = models.copy("hf", tmp_path / "m"), os.stat

    def fails(path: Any, *more: Any, **settings: Any) -> os.stat_result:
        if not isinstance(path, int) and os.fspath(path).endswith(f"m/{name}"):
            raise OSError(number, os.strerror(number), os.fspath(path))
        return real(path, *more, **settings)

    monkeypatch.setattr(os, "stat", fails)
    monkeypatch.setattr(Path, "stat", lambda path, **settings: fails(path, **settings))
    with pytest.raises(InputError, match=name):
        llava_convert.convert(model, to="official", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


# Memory.


def many(path: Path, count: int) -> None:
    entries = (f'"t{n}":{{"dtype":"F16","shape":[0],"data_offsets":[0,0]}}' for n in range(count))
    header = ("{" + ",".join(entries) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


@linux
def test_more_tensors_than_any_model_has(models: Models, tmp_path: Path) -> None:
    """Refused before memory moves: a process that looks at it stays below 300 MB."""
    model = models.copy("hf", tmp_path / "m")
    many(model / "model.safetensors", 700_000)
    script = (
        "import re, sys; from pathlib import Path; from llava_convert.cli import app; "
        "code = app(sys.argv[1:], standalone_mode=False); "
        "print(code, re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    found = subprocess.run([sys.executable, "-c", script, "inspect", str(model)], capture_output=True, check=True)
    code, peak = map(int, found.stdout.split())
    assert code == 3 and peak < 300_000, (code, peak)
    assert f"more than {MAX_TENSORS:,}".encode() in found.stderr


def test_an_index_of_more(models: Models, tmp_path: Path) -> None:
    model = models.copy("hf", tmp_path / "m")
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    named = {f"t{n}": "model-00001-of-00001.safetensors" for n in range(MAX_TENSORS + 1)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    with pytest.raises(InputError, match=f"{MAX_TENSORS + 1:,} tensors"):
        llava_convert.inspect(model)
