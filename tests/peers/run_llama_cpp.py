"""Ask llama.cpp's own libraries about GGUF files: `run_llama_cpp.py RESULT`, with a job on stdin.

The job has `runtime` (`stock` or `repaired`), `folder` for arrays, and `tasks`: name -> a task. Each task has `kind`
and `model`, a language model's file:

    vocabulary   ids that end a turn, bos, eos, eot, whether BOS is added, the chat template, the number of tokens
    tokenize     `texts`, specials recognised, nothing added -> their ids, and each id list as text again
    logits       `ids` -> NAME.npy: logits at every position, (length, vocabulary), float32
    generate     `ids`, `count` -> greedy ids until a token that ends the turn, which is included
    picture      `mmproj`, `picture` (.npy, height x width x 3 bytes), `prompt` with the marker `<__media__>`, `count`
                 -> NAME.npy: the rows that stand for the picture, (rows, width of the LLM); the text ids around them;
                 greedy ids as above

The cache of keys and values is float32 and flash attention is off, so that only the weights' types cost accuracy.
RESULT gets JSON: task -> what it found.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

JOB = json.load(sys.stdin)
ENVIRONMENT = Path(sys.prefix)
RUNTIME = ENVIRONMENT / "runtime" / JOB["runtime"]
FOLDER = Path(JOB["folder"])
THREADS = 2
F32 = 0  # enum ggml_type

os.environ["LLAMA_CPP_LIB_PATH"] = os.environ["MTMD_CPP_LIB"] = str(RUNTIME)
# The package's own __init__ wants more packages than the declarations need.
_package = types.ModuleType("llama_cpp")
_package.__path__ = [str(ENVIRONMENT / "binding" / "llama_cpp")]
sys.modules["llama_cpp"] = _package

from llama_cpp import llama_cpp as c  # noqa: E402
from llama_cpp import mtmd_cpp as m  # noqa: E402

COMPLAINTS: list[str] = []


@c.llama_log_callback
def _log(level: int, text: bytes, _: Any) -> None:
    if level in (3, 4):  # warnings and errors
        COMPLAINTS.append(text.decode(errors="replace").strip())


class Model:
    """A language model's file, opened; `context` gives it a fresh memory."""

    def __init__(self, path: str, *, vocabulary_only: bool = False) -> None:
        params = c.llama_model_default_params()
        params.vocab_only = vocabulary_only
        # Repacked weights are multiplied in another order than the one that quantised files are compared in.
        params.use_extra_bufts = False
        params.n_gpu_layers = 0
        self.model = c.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp does not load it: " + " | ".join(COMPLAINTS))
        self.vocab = c.llama_model_get_vocab(self.model)
        self.size = c.llama_vocab_n_tokens(self.vocab)

    @contextmanager
    def context(self, length: int) -> Iterator[Any]:
        params = c.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = max(64, length)
        params.n_threads = params.n_threads_batch = THREADS
        params.type_k = params.type_v = F32
        params.flash_attn_type = 0
        context = c.llama_init_from_model(self.model, params)
        if not context:
            raise SystemExit("llama.cpp makes no context: " + " | ".join(COMPLAINTS))
        yield context
        c.llama_free(context)

    def tokens(self, text: str) -> list[int]:
        data = text.encode()
        buffer = (c.llama_token * (len(data) + 8))()
        found = c.llama_tokenize(self.vocab, data, len(data), buffer, len(buffer), False, True)
        if found < 0:
            raise SystemExit(f"{text!r} gives {-found} tokens, more than its bytes")
        return list(buffer[:found])

    def text(self, ids: list[int]) -> str:
        given = (c.llama_token * len(ids))(*ids)
        buffer = ctypes.create_string_buffer(64 * len(ids) + 64)
        found = c.llama_detokenize(self.vocab, given, len(ids), buffer, len(buffer), False, True)
        return buffer.raw[: max(found, 0)].decode(errors="replace")


def decode(context: Any, ids: list[int], start: int) -> None:
    """Run tokens from a position on, keeping the logits of each."""
    batch = c.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place] = token
        batch.pos[place] = start + place
        batch.n_seq_id[place] = 1
        batch.seq_id[place][0] = 0
        batch.logits[place] = 1
    if c.llama_decode(context, batch) != 0:
        raise SystemExit("llama_decode failed: " + " | ".join(COMPLAINTS))
    c.llama_batch_free(batch)


def last(context: Any, size: int) -> np.ndarray:
    return np.ctypeslib.as_array(c.llama_get_logits_ith(context, -1), shape=(size,))


def greedy(model: Model, context: Any, start: int, count: int) -> list[int]:
    """Ids by the largest logit, from the logits that the context holds on."""
    written: list[int] = []
    while len(written) < count:
        written.append(int(last(context, model.size).argmax()))
        if c.llama_vocab_is_eog(model.vocab, written[-1]):
            break
        decode(context, written[-1:], start + len(written) - 1)
    return written


def vocabulary(name: str, task: dict[str, Any]) -> dict[str, Any]:
    model = Model(task["model"], vocabulary_only=True)
    template = c.llama_model_chat_template(model.model, None)
    return {
        "tokens": model.size,
        "ends": [token for token in range(model.size) if c.llama_vocab_is_eog(model.vocab, token)],
        "bos": c.llama_vocab_bos(model.vocab),
        "eos": c.llama_vocab_eos(model.vocab),
        "eot": c.llama_vocab_eot(model.vocab),
        "add_bos": bool(c.llama_vocab_get_add_bos(model.vocab)),
        "template": template.decode() if template else None,
    }


def tokenize(name: str, task: dict[str, Any]) -> dict[str, Any]:
    model = Model(task["model"], vocabulary_only=True)
    ids = [model.tokens(text) for text in task["texts"]]
    return {"ids": ids, "texts": [model.text(each) for each in ids]}


def logits(name: str, task: dict[str, Any]) -> dict[str, Any]:
    model = Model(task["model"])
    ids = task["ids"]
    with model.context(len(ids)) as context:
        decode(context, ids, 0)
        rows = np.ctypeslib.as_array(c.llama_get_logits(context), shape=(len(ids), model.size))
        np.save(FOLDER / f"{name}.npy", rows)
    return {}


def generate(name: str, task: dict[str, Any]) -> dict[str, Any]:
    model = Model(task["model"])
    ids = task["ids"]
    with model.context(len(ids) + task["count"]) as context:
        decode(context, ids, 0)
        written = greedy(model, context, len(ids), task["count"])
    return {"ids": written, "text": model.text(written)}


def picture(name: str, task: dict[str, Any]) -> dict[str, Any]:
    model = Model(task["model"])
    params = m.mtmd_context_params_default()
    params.use_gpu = params.print_timings = params.warmup = False
    params.n_threads = THREADS
    params.flash_attn_type = 0
    eyes = m.mtmd_init_from_file(task["mmproj"].encode(), model.model, params)
    if not eyes:
        raise SystemExit(f"{task['mmproj']}: llama.cpp does not load it: " + " | ".join(COMPLAINTS))
    data = np.ascontiguousarray(np.load(task["picture"]), dtype=np.uint8)
    bitmap = m.mtmd_bitmap_init(data.shape[1], data.shape[0], data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
    prompt = task["prompt"].encode()
    text = m.mtmd_input_text(prompt, len(prompt), False, True)
    chunks = m.mtmd_input_chunks_init()
    if m.mtmd_tokenize(eyes, chunks, ctypes.byref(text), (ctypes.c_void_p * 1)(bitmap), 1) != 0:
        raise SystemExit("mtmd_tokenize failed: " + " | ".join(COMPLAINTS))
    around: list[list[int]] = []
    seen: list[int] = []
    length = 0
    width = c.llama_model_n_embd_inp(model.model)
    for number in range(m.mtmd_input_chunks_size(chunks)):
        chunk = m.mtmd_input_chunks_get(chunks, number)
        rows = m.mtmd_input_chunk_get_n_tokens(chunk)
        length += rows
        if m.mtmd_input_chunk_get_type(chunk) == m.MTMD_INPUT_CHUNK_TYPE_TEXT:
            size = ctypes.c_size_t()
            ids = m.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(size))
            around.append(list(ids[: size.value]))
        else:
            seen.append(rows)
            if m.mtmd_encode_chunk(eyes, chunk) != 0:
                raise SystemExit("mtmd_encode_chunk failed: " + " | ".join(COMPLAINTS))
            found = ctypes.cast(m.mtmd_get_output_embd(eyes), ctypes.POINTER(ctypes.c_float))
            np.save(FOLDER / f"{name}.npy", np.ctypeslib.as_array(found, shape=(rows, width)))
    with model.context(length + task["count"]) as context:
        end = c.llama_pos()
        done = m.mtmd_helper_eval_chunks(eyes, context, chunks, 0, 0, length, True, ctypes.byref(end))
        if done != 0:
            raise SystemExit("mtmd_helper_eval_chunks failed: " + " | ".join(COMPLAINTS))
        written = greedy(model, context, end.value, task["count"])
    return {"around": around, "rows": seen, "ids": written, "text": model.text(written)}


KINDS: dict[str, Callable[[str, dict[str, Any]], dict[str, Any]]] = {
    each.__name__: each for each in (vocabulary, tokenize, logits, generate, picture)
}


def main() -> None:
    """Run the job."""
    c.llama_log_set(_log, None)
    m.mtmd_helper_log_set(_log, None)
    c.llama_backend_init()
    found = {}
    for name, task in JOB["tasks"].items():
        COMPLAINTS.clear()
        found[name] = KINDS[task["kind"]](name, task) | {"complaints": list(COMPLAINTS)}
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
