"""What a program that runs models does here: answer a conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from llava_convert.app.ask.prompts import Message
from llava_convert.core.values import dataclass

if TYPE_CHECKING:
    from PIL.Image import Image

TRANSFORMERS, LLAMA_CPP = "transformers", "llama.cpp"

Stream = Callable[[str], None]
"""Called with each piece of an answer as it comes."""


@dataclass(frozen=True)
class Answer:
    """What a model said; `tokens` is how many it took, `stopped` is false where it reached the limit.

    `ids` are the tokens, where the runtime tells them.
    """

    text: str
    tokens: int
    stopped: bool
    ids: tuple[int, ...] = ()


class Runtime(Protocol):
    """A loaded model."""

    name: str

    def answer(
        self, messages: Sequence[Message], pictures: Sequence[Image], *, limit: int, stream: Stream | None = None
    ) -> Answer:
        """The greedy answer, of at most `limit` tokens. Each `<image>` in the messages is the next of the pictures."""
        ...
