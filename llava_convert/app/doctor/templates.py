"""What a chat template makes of a conversation: where a turn ends, and whether it takes list content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from llava_convert.app.doctor.folder import Folder

_SAID = "QZXQ"  # no template writes that by itself


def turn_end(folder: Folder) -> str | None:
    """The special token by which the template ends an answer; None where it renders none."""
    template, tokenizer = folder.template, folder.tokenizer
    if template is None or tokenizer is None:
        return None
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": _SAID}]
    text = rendered(folder, template, talk)
    after = (text or "").partition(_SAID)[2]
    specials = {str(entry["content"]) for entry in tokenizer.added.values()} | {tokenizer.eos or ""}
    found = [token for token in specials if token and after.strip().startswith(token)]
    return max(found, key=len) if found else None


def takes_lists(folder: Folder, template: str) -> bool:
    """Whether a picture in list content becomes `<image>` in the text."""
    content = [{"type": "image"}, {"type": "text", "text": _SAID}]
    text = rendered(folder, template, [{"role": "user", "content": content}])
    return text is not None and "<image>" in text and _SAID in text and "{'type'" not in text


def rendered(folder: Folder, template: str, messages: Sequence[dict[str, Any]]) -> str | None:
    """The text, by the environment that transformers renders templates in; None where the template fails."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    made.globals["raise_exception"] = raise_exception
    tokens = {name: folder.token(name) or "" for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    try:
        return made.from_string(template).render(messages=list(messages), add_generation_prompt=False, **tokens)
    except (TemplateError, TypeError):  # a string and a list are no sum
        return None
