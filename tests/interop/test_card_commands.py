"""What a card prints is run as it is printed, from the folder that holds the output.

Here: transformers, llama.cpp's server (in xllamacpp) and llava-convert itself. As `peers`: older transformers, the
LLaVA package, `xtuner chat` and llama.cpp's command line. vLLM and LMDeploy are in no environment here: of their
commands the options are held to what was looked up (docs/cards.md).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import llava_convert
from tests.interop.card_blocks import block, blocks
from tests.interop.peer_programs import PEERS, in_peer
from tests.interop.printed_commands import served, words

CAPTION = "a red sun over green hills"
QUESTION = "What is in this picture?"
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def shelf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user stands: the picture is here, and the base models under the ids that the cards name."""
    folder = tmp_path_factory.mktemp("shelf")
    Image.open(tiny / "picture.png").convert("RGB").save(folder / "picture.jpg", quality=95)
    shutil.copytree(tiny / "llm", folder / "org" / "tiny-llm")
    shutil.copytree(tiny / "vit", folder / "openai" / "tiny-vit")  # LLaVA wants a tower of openai's
    return folder


@pytest.fixture(scope="module")
def make(tiny: Path, shelf: Path) -> Make:
    """An output on the shelf, by layout and part, each made once."""

    def go(to: str, name: str | None = None, **options: Any) -> Path:
        folder = shelf / (name or "-".join(["tiny", to, *map(str, options.values())]))
        if not folder.exists():
            ids = {"llm_id": "org/tiny-llm", "visual_encoder_id": "openai/tiny-vit"}
            llava_convert.convert(tiny / "iter_2.pth", to=to, out=folder, **ids, **options)
        return folder

    return go


def python(code: str, shelf: Path, program: str | Path = sys.executable) -> str:
    """What a block of Python prints."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(shelf / "modules")}
    done = subprocess.run([program, "-c", code], cwd=shelf, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{code}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


def peer(environment: str) -> Path:
    found = PEERS / environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not found.is_file():
        pytest.skip(f"no environment {environment}: `make peers` builds it")
    return found


# transformers.


@pytest.mark.parametrize("number", [0, 1], ids=["pipeline", "step by step"])
def test_transformers(make: Make, shelf: Path, number: int) -> None:
    assert python(block(make("hf"), "transformers", number=number), shelf) == CAPTION


@pytest.mark.parametrize("number", [0, 1], ids=["pipeline", "step by step"])
def test_transformers_without_a_chat_template(make: Make, shelf: Path, number: int) -> None:
    """The raw prompt stands in for it: the question alone, of which nothing is known."""
    source = make("official", name="plain-official")
    config = json.loads((source / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    folder = shelf / "plain-hf"
    llava_convert.convert(source, to="hf", out=folder, force=True)
    code = block(folder, "transformers", number=number)
    assert "apply_chat_template" not in code and "messages" not in code
    assert python(code, shelf)


def test_a_language_model_alone(make: Make, shelf: Path) -> None:
    code = block(make("hf", part="llm"), "transformers")
    assert python(code, shelf)
    for to in ("xtuner", "official"):
        assert block(make(to, part="llm"), "transformers") == code.replace("tiny-hf-llm", f"tiny-{to}-llm")


def test_a_tower_and_a_projector_alone(make: Make, shelf: Path) -> None:
    tower = python(block(make("hf", part="visual-encoder"), "transformers"), shelf)
    assert tower == "torch.Size([1, 17, 32])"  # 16 patches and the class token
    projector = python(block(make("hf", part="projector"), "safetensors"), shelf)
    assert "'multi_modal_projector.linear_1.weight': (64, 32)" in projector


@pytest.mark.peers
@pytest.mark.parametrize(("version", "numbers"), [("4.57", (0, 1)), ("4.46", (1,))])
def test_older_transformers(make: Make, shelf: Path, version: str, numbers: tuple[int, ...]) -> None:
    """The card says that the pipeline wants 4.47."""
    for number in numbers:
        code = block(make("hf"), "transformers", number=number)
        assert python(code, shelf, peer(f"transformers-{version}")).splitlines()[-1] == CAPTION


@pytest.mark.peers
def test_an_adapter_of_a_tower_alone(make: Make, shelf: Path) -> None:
    """In a transformers before 5.6, as the card says: the weights are those of the file, and not peft's zeros."""
    folder = make("xtuner", part="visual-encoder")
    code = block(folder, "peft") + (
        "from safetensors.torch import load_file\n"
        f"saved = load_file('{folder.name}/visual_encoder_adapter/adapter_model.safetensors')\n"
        "loaded = {k.replace('.default', ''): v for k, v in tower.state_dict().items() if '.lora_' in k}\n"
        "same = [bool((value == loaded[key]).all()) for key, value in saved.items()]\n"
        "print(len(saved), loaded.keys() == saved.keys(), all(same))\n"
    )
    assert python(code, shelf, peer("xtuner")).splitlines()[-1] == "36 True True"


# The original code, and xtuner.


@pytest.mark.peers
def test_llava(make: Make, shelf: Path) -> None:
    assert python(block(make("official"), "LLaVA"), shelf, peer("llava")).splitlines()[-1] == CAPTION


@pytest.mark.peers
def test_llavas_projector_alone(make: Make, shelf: Path) -> None:
    """The loaded projector is the file's, in the float16 that the loader chooses."""
    folder = make("official", part="projector")
    code = block(folder, "LLaVA") + (
        "import torch\n"
        f"saved = torch.load('{folder.name}/mm_projector.bin')\n"
        "print(all(bool((model.state_dict()[k] == v.half()).all()) for k, v in saved.items()), len(saved))\n"
    )
    assert python(code, shelf, peer("llava")).splitlines()[-1] == "True 4"


@pytest.mark.peers
@pytest.mark.parametrize("options", [{}, {"part": "projector"}], ids=["whole", "projector"])
def test_xtuner_chat(make: Make, shelf: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]) -> None:
    """What a pretraining leaves takes both base models; their answer is of no projector that fits them."""
    code = block(make("xtuner", **options), "xtuner", "shell")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    job = {"words": words(code), "said": [QUESTION]}
    printed = in_peer("xtuner", "run_xtuner_command.py", job, shelf)["printed"]
    if options:
        assert "Load LLM from org/tiny-llm\nLoad visual_encoder from openai/tiny-vit\n" in printed
    else:
        assert f"\n{CAPTION}<|eot_id|>\n" in printed
        assert "Load visual_encoder adapter from tiny-xtuner\n" in printed


# llama.cpp.


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_the_request_to_llama_server(make: Make, shelf: Path) -> None:
    """By the shell and curl, as printed, but for the port."""
    folder = make("gguf")
    request = next(b.code for b in blocks(folder) if b.code.startswith("curl"))
    line = next(b.code for b in blocks(folder) if b.code.startswith("llama-server"))
    with served(line, shelf) as address:
        code = request.replace("http://localhost:8080", address)
        assert code != request
        done = subprocess.run(["sh", "-c", code], cwd=shelf, capture_output=True, text=True, timeout=120, check=True)
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"] == CAPTION
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.peers
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "100KB"}], ids=["one file", "split"])
def test_llama_mtmd_cli(make: Make, shelf: Path, options: dict[str, str]) -> None:
    """As printed, but for where the program lies; it ends without waiting for its output, cut off now and then."""
    line = next(b.code for b in blocks(make("gguf", **options)) if b.code.startswith("llama-mtmd-cli"))
    name, *arguments = words(line)
    program = PEERS / "llama.cpp" / "runtime" / "stock" / name
    if not program.is_file():
        pytest.skip("no environment llama.cpp: `make peers` builds it")
    said = set()
    for _ in range(8):
        done = subprocess.run([program, *arguments], cwd=shelf, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        said.add(done.stdout.strip())
        assert CAPTION.startswith(done.stdout.strip())
        if CAPTION in said:
            return
    raise AssertionError(said)


# llava-convert itself, and what nobody can run here.


@pytest.mark.parametrize("to", ["hf", "official", "xtuner", "gguf"])
def test_verify_as_printed(make: Make, shelf: Path, tiny: Path, to: str) -> None:
    line = next(b.code for b in blocks(make(to)) if b.code.startswith("llava-convert verify"))
    name, *arguments = shlex.split(line.replace("SOURCE", shlex.quote(str(tiny / "iter_2.pth"))))
    assert name == "llava-convert"
    command = [sys.executable, "-m", "llava_convert", *arguments]
    done = subprocess.run(command, cwd=shelf, capture_output=True, text=True)
    assert done.returncode == 0 and "the same" in done.stdout + done.stderr, done.stderr


# The options that the programs' own parsers know: vLLM 0.33.0, LMDeploy 0.13.0 and 0.18.0, huggingface_hub 2.4.0,
# Ollama's documentation. A new one goes here when it has been looked up there, and into docs/cards.md.
OPTIONS = {
    "vllm serve": {"--chat-template"},
    "lmdeploy serve api_server": {"--chat-template"},
    "hf download": {"--local-dir"},
    "ollama create": {"-f"},
    "ollama run": set(),
    "pip install": set(),
    "llama-mtmd-cli": {"-m", "--mmproj", "--image", "-p", "--temp"},
    "llama-server": {"-m", "--mmproj"},
    "llama-cli": {"-m", "-p", "--single-turn"},
    "llava-convert verify": set(),
    "xtuner chat": {"--llava", "--visual-encoder", "--prompt-template", "--image"},
    "curl": {"-H", "-d"},
}
OUTPUTS = [
    (to, part)
    for to, parts in {
        "hf": (None, "llm", "visual-encoder", "projector"),
        "official": (None, "llm", "visual-encoder", "projector"),
        "xtuner": (None, "llm", "visual-encoder", "projector"),
        "gguf": (None, "llm", "visual-encoder"),
    }.items()
    for part in parts
]


@pytest.mark.parametrize(("to", "part"), OUTPUTS)
def test_no_command_has_an_option_that_was_not_looked_up(make: Make, to: str, part: str | None) -> None:
    folder = make(to, **({"part": part} if part else {}))
    lines = [line for b in blocks(folder) if b.language == "shell" for line in commands(b.code)]
    assert lines
    for line in lines:
        said = shlex.split(line)
        name = next(name for name in OPTIONS if said[: len(name.split())] == name.split())
        found = {word for word in said[len(name.split()) :] if re.match(r"-{1,2}[A-Za-z]", word)}
        assert found <= OPTIONS[name], line


def commands(code: str) -> list[str]:
    """The commands of a block of shell, without what is given on standard input."""
    return code.replace("\\\n", "").partition("@- <<EOF")[0].strip().splitlines()


@pytest.mark.parametrize(("to", "part"), OUTPUTS)
def test_files_that_commands_name_are_there(make: Make, shelf: Path, to: str, part: str | None) -> None:
    """Whatever lies in the output's folder by its name; base models and the picture lie elsewhere."""
    folder = make(to, **({"part": part} if part else {}))
    code = "\n".join(b.code for b in blocks(folder))
    named = set(re.findall(rf"{re.escape(folder.name)}/[\w./-]+", code))
    assert all((shelf / name).exists() for name in named), named
    assert named or folder.name in code
