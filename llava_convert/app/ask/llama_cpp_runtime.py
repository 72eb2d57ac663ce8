"""GGUF in llama.cpp's server, which runs in this process by xllamacpp and uses the file's own chat template."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_convert.app.ask.prompts import IMAGE, Message
from llava_convert.app.ask.runtimes import LLAMA_CPP, Answer, Stream
from llava_convert.core.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

_CONTEXT = 4096


class LlamaCppRuntime:
    """A language model's file and its mmproj. Raises UsageError without xllamacpp."""

    name = LLAMA_CPP

    def __init__(self, llm: Path, mmproj: Path | None, *, gpu: bool, exact: bool = False) -> None:
        """`exact` keeps what it remembers of a text in float32, so that only the weights' types cost accuracy."""
        try:
            import xllamacpp
        except ImportError:
            raise UsageError(
                "GGUF runs in llama.cpp by xllamacpp, which is not installed",
                hint="pip install 'llava-convert[llamacpp]', or --runtime transformers",
            ) from None
        params = xllamacpp.CommonParams()
        params.model.path = str(llm)
        if mmproj is not None:
            params.mmproj.path = str(mmproj)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = _CONTEXT, 1, -1 if gpu else 0
        params.warmup, params.verbosity = False, -1
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as problem:
            raise UnsupportedError(
                f"llama.cpp cannot load {llm}: {problem}", hint="--runtime transformers computes it without llama.cpp"
            ) from problem

    def answer(
        self, messages: Sequence[Message], pictures: Sequence[Image], *, limit: int, stream: Stream | None = None
    ) -> Answer:
        found = self.completion(messages, pictures, limit)
        choice = found["choices"][0]
        text: str = choice["message"]["content"] or ""
        if stream is not None:
            stream(text)
        tokens = int((found.get("usage") or {}).get("completion_tokens", 0))
        return Answer(text.strip(), tokens, choice.get("finish_reason") == "stop")

    def completion(
        self, messages: Sequence[Message], pictures: Sequence[Image], limit: int, **more: Any
    ) -> dict[str, Any]:
        """The server's own reply, with the first choice greedy; `more` goes into the request."""
        left = list(pictures)
        body: dict[str, Any] = {
            "messages": [{"role": m["role"], "content": _content(m["content"], left)} for m in messages],
            "max_tokens": limit,
            "temperature": 0,
            "cache_prompt": False,
            **more,
        }
        if left:
            raise UsageError(
                f"{len(pictures)} pictures, and {len(left)} of them have no <image> in the conversation",
                hint="leave --image out where a model's turn is not asked about it",
            )
        found = self._server.handle_chat_completions(body)
        if isinstance(found, str | bytes):
            found = json.loads(found)
        if "choices" not in found:
            raise UnsupportedError(
                f"llama.cpp refuses the conversation: {found.get('error', found)}",
                hint="--runtime transformers computes it without llama.cpp",
            )
        return dict(found)


def _content(text: str, pictures: list[Image]) -> Any:
    """A message as OpenAI's protocol has it, its pictures taken from the front of the list."""
    pieces = text.split(IMAGE)
    if len(pieces) == 1:
        return text
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(pieces):
        parts += [{"type": "text", "text": piece}] if piece else []
        if i < len(pieces) - 1:
            if not pictures:
                raise UsageError("a conversation with more <image> than pictures", hint="give one --image for each")
            parts.append({"type": "image_url", "image_url": {"url": _data_url(pictures.pop(0))}})
    return parts


def _data_url(picture: Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
