"""`--chat-template` and `--stop`: how an output is prompted and where it stops, as the user says, in each layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llava_convert
from llava_convert.core.errors import InputError, UnsupportedError, UsageError
from llava_convert.storage.gguf.file import read_gguf

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
END, RESERVED, EOT = 449, 456, 457


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("talk") / "hf"
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=out)
    return out


@pytest.fixture(scope="module")
def gguf(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("talk") / "gguf"
    llava_convert.convert(model, to="gguf", out=out)
    return out


@pytest.fixture
def template(tmp_path: Path) -> Path:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    return file


def metadata(folder: Path) -> dict[str, Any]:
    (file,) = (path for path in folder.glob("*.gguf") if "mmproj" not in path.name)
    return {key: typed.value for key, typed in read_gguf(file).metadata.items()}


def test_gguf_to_gguf(gguf: Path, template: Path, tmp_path: Path) -> None:
    before, out = metadata(gguf), tmp_path / "out"
    assert before["tokenizer.ggml.eos_token_id"] == EOT
    llava_convert.convert(gguf, to="gguf", out=out, chat_template=template, stop=f"<|end_of_text|>,{RESERVED}")
    after = metadata(out)
    assert after["tokenizer.chat_template"] == TEMPLATE
    assert after["tokenizer.ggml.eos_token_id"] == END
    assert after["tokenizer.ggml.eot_token_id"] == RESERVED
    assert {key for key in before if before[key] != after.get(key)} <= {
        "general.name",
        "tokenizer.chat_template",
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.eot_token_id",
    }
    (modelfile,) = out.glob("*.Modelfile")
    stops = [line for line in modelfile.read_text().splitlines() if line.startswith("PARAMETER stop")]
    assert stops == ['PARAMETER stop "<|end_of_text|>"', 'PARAMETER stop "<|reserved_special_token_4|>"']
    options = json.loads((out / "conversion.json").read_text())["options"]
    assert (options["chat_template"], options["stop"]) == (TEMPLATE, f"<|end_of_text|>,{RESERVED}")
    assert llava_convert.verify(gguf, out)


@pytest.mark.parametrize("to", ["hf", "official", "xtuner"])
def test_in_a_folder(model: Path, template: Path, tmp_path: Path, to: str) -> None:
    """A template in a JSON file, and ids as Python has them."""
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({"chat_template": TEMPLATE}))
    out = tmp_path / "out"
    llava_convert.convert(model, to=to, out=out, chat_template=file, stop=[EOT, "<|reserved_special_token_4|>"])
    (config,) = out.rglob("generation_config.json")
    assert json.loads(config.read_text())["eos_token_id"] == [EOT, RESERVED]
    assert json.loads((config.parent / "tokenizer_config.json").read_text())["chat_template"].endswith(TEMPLATE)
    assert llava_convert.verify(model, out)


def test_more_than_a_gguf_can_say(gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="GGUF has room for two, an EOT and an EOM token"):
        llava_convert.convert(gguf, to="gguf", out=tmp_path / "out", stop="450,451,452,453")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"stop": "a b c"}, UsageError, "is no token of the model"),
        ({"stop": "99999"}, UsageError, "the vocabulary has"),
        ({"stop": " , "}, UsageError, "names no token"),
        ({"stop": 457, "part": "visual-encoder"}, UsageError, "no language model is written"),
        ({"chat_template": "nowhere.jinja"}, InputError, "no such file"),
        ({"chat_template": __file__, "prompt_template": "vicuna"}, UsageError, "both say how the model is prompted"),
    ],
)
def test_what_cannot_be(
    model: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        llava_convert.convert(model, to="hf", out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_file_without_a_template(model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds no chat template"):
        llava_convert.convert(model, to="hf", out=tmp_path / "out", chat_template=tmp_path / "tokenizer_config.json")


def test_a_pth_has_no_place_for_them(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not apply to pth"):
        llava_convert.convert(model, to="pth", out=tmp_path / "out.pth", stop=457)
