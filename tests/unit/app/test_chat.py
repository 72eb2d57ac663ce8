"""Conversations, pictures from anywhere, and the loader under `chat`."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import llava_convert
from llava_convert.app.ask.chat import Conversation
from llava_convert.app.ask.pictures import Eyes, open_picture
from llava_convert.app.ask.prompts import Message
from llava_convert.app.ask.runtimes import Answer, Stream
from llava_convert.assets.processor import squared
from llava_convert.cli import app
from llava_convert.core.errors import HubError, InputError, UnsupportedError, UsageError
from training.tiny import image_processor

SAID = "a red sun over green hills"  # what the committed checkpoint learnt to say of the committed picture
QUESTION = "What is in this picture?"


class Echo:
    """A runtime that tells what it was asked."""

    name = "transformers"

    def __init__(self) -> None:
        self.asked: list[tuple[list[Message], int]] = []

    def answer(
        self, messages: Sequence[Message], pictures: Sequence[Any], *, limit: int, stream: Stream | None = None
    ) -> Answer:
        self.asked.append((list(messages), len(pictures)))
        if messages[-1]["content"] == "fail":
            raise UnsupportedError("no")
        return Answer(f"answer {len(self.asked)}", 2, True)


def test_turns(tiny: Path) -> None:
    echo = Echo()
    talk = Conversation(echo, 8, "Be brief.")
    talk.show(str(tiny / "picture.png"))
    talk.ask("What is it?")
    with pytest.raises(UnsupportedError):
        talk.ask("fail")
    talk.ask("Sure?")
    system, first = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>\nWhat is it?"}
    second = {"role": "user", "content": "Sure?"}
    assert echo.asked[0] == ([system, first], 1)
    assert echo.asked[2] == ([system, first, {"role": "assistant", "content": "answer 1"}, second], 1)
    talk.reset()
    talk.ask("Who are you?")
    assert echo.asked[3] == ([system, {"role": "user", "content": "Who are you?"}], 0)


def test_pictures_are_opened_from_anywhere(tiny: Path, tmp_path: Path) -> None:
    path = tiny / "picture.png"
    wanted = Image.open(path).convert("RGB").tobytes()
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    assert open_picture(path).tobytes() == open_picture(url).tobytes() == wanted
    for broken, message in ((tmp_path / "absent.png", "No such file"), (tiny / "iter_2.pth", "not a picture")):
        with pytest.raises(InputError, match=message):
            open_picture(broken)
    with pytest.raises(HubError):
        open_picture("http://127.0.0.1:9/picture.png")


def test_a_wide_picture_is_padded_with_the_mean() -> None:
    """What is above and below becomes zero, the mean; the picture's own rows are in the middle."""
    wide = Image.new("RGB", (56, 28), (255, 255, 255))
    square = squared(wide, (1, 2, 3))
    assert square.size == (56, 56) and square.getpixel((0, 13)) == (1, 2, 3)
    assert square.getpixel((0, 14)) == square.getpixel((55, 41)) == (255, 255, 255)
    padded = np.asarray(Eyes(image_processor(56), "pad").pixels(wide))
    assert padded.shape == (1, 3, 56, 56)
    assert np.abs(padded[0, :, :12]).max() < 0.02 and padded[0, :, 20:36].min() > 1.9
    cropped = np.asarray(Eyes(image_processor(56), None).pixels(wide))
    assert cropped.min() > 1.9
    with pytest.raises(UnsupportedError, match="anyres"):
        Eyes(image_processor(56), "anyres")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["pth", "xtuner", "official", "hf", "gguf"])
def test_every_layout_answers_from_its_own_files(tiny: Path, tmp_path: Path, to: str) -> None:
    source = tiny / "iter_2.pth"
    if to != "pth":
        source = tmp_path / "o"
        llava_convert.convert(tiny / "iter_2.pth", to=to, out=source)
    before = sorted(p for p in tmp_path.rglob("*"))
    base = {} if to in ("pth", "hf", "gguf") else {"visual_encoder": str(tiny / "vit")}
    for runtime in (None, *(["transformers"] if to == "gguf" else [])):
        reply = llava_convert.chat(source, QUESTION, image=tiny / "picture.png", runtime=runtime, **base)
        assert (reply.answer, reply.stopped, reply.layout) == (SAID, True, to)
        assert reply.runtime == ("llama.cpp" if to == "gguf" and runtime is None else "transformers")
    assert sorted(p for p in tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_four_bits_answer(tiny: Path) -> None:
    pytest.importorskip("bitsandbytes")
    reply = llava_convert.chat(tiny / "iter_2.pth", QUESTION, image=tiny / "picture.png", four_bit=True)
    assert reply.answer.startswith("a red")


@pytest.mark.slow
def test_the_command(tiny: Path, tmp_path: Path) -> None:
    words = ["chat", str(tiny / "iter_2.pth"), "--image", str(tiny / "picture.png")]
    one = CliRunner().invoke(app, [*words, QUESTION])
    assert (one.exit_code, one.stdout) == (0, f"{SAID}\n"), one.output
    short = CliRunner().invoke(app, [*words, QUESTION, "--max-new-tokens", "2", "--json"])
    value = json.loads(short.stdout)
    assert (value["stopped"], value["tokens"], value["images"]) == (False, 2, [str(tiny / "picture.png")])
    said = f"{QUESTION}\n/image {tmp_path / 'absent.png'}\n/reset\n/image {tiny / 'picture.png'}\n{QUESTION}\n/exit\nno"
    talk = CliRunner().invoke(app, words, input=said)
    assert (talk.exit_code, talk.stdout) == (0, f"{SAID}\n{SAID}\n"), talk.output
    assert "absent.png: No such file" in talk.stderr
    alone = CliRunner().invoke(app, words[:2], input="/image\n/exit\n")
    assert alone.stderr.count("/image FILE|URL shows a picture") == 2 and "warning" not in alone.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "llama.cpp"}, "which llama.cpp does not read"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"device": "tpu"}, "device='tpu'"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        llava_convert.chat(tiny / "iter_2.pth", QUESTION, **options)


def test_a_tower_that_is_missing_is_asked_for(tiny: Path, tmp_path: Path) -> None:
    llava_convert.convert(tiny / "iter_2.pth", to="xtuner", out=tmp_path / "o", visual_encoder_id="org/absent")
    with pytest.raises(InputError, match="base vision tower 'org/absent'"):
        llava_convert.chat(tmp_path / "o", QUESTION)
