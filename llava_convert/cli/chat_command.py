"""`llava-convert chat SOURCE`: ask a model of any layout about pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from llava_convert.app.jobs.ask import ChatJob
from llava_convert.cli._options import Command, command
from llava_convert.cli._output import Output
from llava_convert.core.errors import ConvertError, UsageError

HELP = "/image FILE|URL shows a picture, /reset begins again, /exit ends."


def made(name: str) -> Command:
    return command(name, ChatJob, _chat)


def _chat(job: ChatJob, output: Output) -> None:
    if job.prompt is None:
        if output.as_json:
            raise UsageError("--json is for one question", hint="give the PROMPT after the source")
        _converse(job, output)
        return
    from llava_convert.app.ask.chat import one_answer

    shown: list[str] = []
    reply = one_answer(job, job.prompt, output, None if output.as_json else _printing(output, shown))
    output.result(reply.as_json())
    _end(output, shown, reply.answer)
    if not reply.stopped:
        output.note(f"the answer reached {reply.tokens} tokens (--max-new-tokens)")


def _converse(job: ChatJob, output: Output) -> None:
    from llava_convert.app.ask.chat import chat

    with chat(job, output) as found:
        output.stop()
        output.note(f"{found.source} ({found.layout}, {found.conversation.runtime.name}). {HELP}")
        for line in _lines():
            word, _, rest = line.partition(" ")
            try:
                if word == "/exit":
                    return
                if word == "/reset":
                    found.conversation.reset()
                elif word == "/image" and rest.strip():
                    found.conversation.show(rest.strip())
                elif word.startswith("/"):
                    output.note(HELP)
                elif line:
                    shown: list[str] = []
                    answer = found.conversation.ask(line, _printing(output, shown))
                    _end(output, shown, answer.text)
            except ConvertError as problem:  # a wrong file ends no conversation
                output.warn(problem.message + (f" ({problem.hint})" if problem.hint else ""))


def _lines() -> Iterator[str]:
    """What the user types, or what a file or pipe holds."""
    while True:
        try:
            yield (input("> ") if sys.stdin.isatty() else input()).strip()
        except EOFError:
            return


def _printing(output: Output, shown: list[str]) -> Callable[[str], None]:
    def piece(text: str) -> None:
        output.stop()
        shown.append(text)
        output.piece(text)

    return piece


def _end(output: Output, shown: list[str], answer: str) -> None:
    """End the line that was streamed; print what was not."""
    output.line("" if "".join(shown).strip() else answer)
