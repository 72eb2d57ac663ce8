"""A conversation with a model about pictures: one question, or several turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import TYPE_CHECKING, Any

from llava_convert.app.ask.load import loaded
from llava_convert.app.ask.pictures import open_picture
from llava_convert.app.ask.prompts import IMAGE, Message
from llava_convert.app.ask.runtimes import Answer, Runtime, Stream
from llava_convert.core.progress import Reporter
from llava_convert.core.values import dataclass

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava_convert.app.jobs.ask import ChatJob


@dataclass(frozen=True)
class Reply:
    """The answer of a model; `stopped` is false if it reached the limit of tokens."""

    source: str
    layout: str
    runtime: str
    prompt: str
    images: tuple[str, ...]
    answer: str
    tokens: int
    stopped: bool

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "images": list(self.images)}


@dataclass
class Conversation:
    """The turns so far. A picture goes in front of the next question."""

    runtime: Runtime
    limit: int
    system: str | None = None
    _messages: list[Message] = field(default_factory=list)
    _pictures: list[Image] = field(default_factory=list)
    _waiting: list[Image] = field(default_factory=list)

    def show(self, place: str) -> None:
        """Take a picture from a file or a URL. Raises what `open_picture` raises."""
        self._waiting.append(open_picture(place))

    def ask(self, text: str, stream: Stream | None = None) -> Answer:
        """Put a question. A turn that fails leaves the conversation as it was."""
        asked = {"role": "user", "content": f"{IMAGE}\n" * len(self._waiting) + text}
        system = [{"role": "system", "content": self.system}] if self.system and not self._messages else []
        messages, pictures = [*self._messages, *system, asked], [*self._pictures, *self._waiting]
        answer = self.runtime.answer(messages, pictures, limit=self.limit, stream=stream)
        self._messages = [*messages, {"role": "assistant", "content": answer.text}]
        self._pictures, self._waiting = pictures, []
        return answer

    def reset(self) -> None:
        """Forget all turns and pictures."""
        self._messages, self._pictures, self._waiting = [], [], []


@dataclass(frozen=True)
class Chat:
    """A loaded model and a conversation with it."""

    source: str
    layout: str
    conversation: Conversation


@contextmanager
def chat(job: ChatJob, say: Reporter) -> Iterator[Chat]:
    """Load the model of a job, and show it the job's pictures."""
    with loaded(job.source, job, say) as model:
        conversation = Conversation(model.runtime, job.max_new_tokens, job.system)
        for place in job.images:
            conversation.show(place)
        yield Chat(str(model.checkpoint.path), model.checkpoint.layout, conversation)


def one_answer(job: ChatJob, prompt: str, say: Reporter, stream: Stream | None = None) -> Reply:
    """The answer to one question."""
    with chat(job, say) as found:
        answer = found.conversation.ask(prompt, stream)
        return Reply(
            found.source, found.layout, found.conversation.runtime.name, prompt, job.images, answer.text, answer.tokens,
            answer.stopped,
        )  # fmt: skip
