"""One loader for all that runs a model: a source of any layout, opened by its headers, made whole, put into memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llava_convert.app.adapters import refuse_ignored
from llava_convert.app.ask.runtimes import LLAMA_CPP, Runtime
from llava_convert.app.options import AskOptions
from llava_convert.app.source import open_whole
from llava_convert.assets.bundle import Artefacts
from llava_convert.core.errors import InputError, UsageError
from llava_convert.core.progress import Reporter
from llava_convert.core.values import dataclass
from llava_convert.layouts.info import LAYOUTS
from llava_convert.model.assemble import assemble, without_added
from llava_convert.model.checkpoint import LLM, PARTS, VISION, Checkpoint
from llava_convert.model.options import TargetOptions
from llava_convert.model.recipe import Model
from llava_convert.storage.remote.mounts import remote_of
from llava_convert.storage.remote.session import Session

if TYPE_CHECKING:
    from llava_convert.app.ask.llama_cpp_runtime import LlamaCppRuntime

# Measured with a model whose answers are known: 127 of 192 right there, 189 in transformers, with the same weights.
_CLASS_TOKEN = (
    "llama.cpp puts the class token of a CLIP tower behind the patches (ggml-org/llama.cpp#25814), and so answers "
    "differently from training; --runtime transformers computes as in training"
)


@dataclass(frozen=True)
class Loaded:
    """A model that runs, and what it was loaded from."""

    checkpoint: Checkpoint
    runtime: Runtime
    session: Session


@contextmanager
def loaded(source: str | Path, options: AskOptions, say: Reporter) -> Iterator[Loaded]:
    """Load a source. Raises what opening, `assemble` and the runtime raise."""
    with Session() as session:
        checkpoint = opened(source, options, say, session)
        if _by_llama_cpp(checkpoint, options):
            for note in llama_cpp_notes(checkpoint):
                say.note(note)
            yield Loaded(checkpoint, _llama_cpp(checkpoint, options), session)
            return
        model, made = whole(checkpoint, options, say, session)
        from llava_convert.app.ask.transformers_runtime import load

        runtime = load(model, made, say, device=options.device, dtype=options.dtype, four_bit=options.four_bit)
        yield Loaded(checkpoint, runtime, session)


def opened(source: str | Path, options: AskOptions, say: Reporter, session: Session) -> Checkpoint:
    """The source by its headers; of quantised weights floats may be made."""
    checkpoint, told = open_whole(source, options, session, dequantize=True)
    for text in map(session.called, (*told, *checkpoint.warnings)):
        say.warn(text)
    return checkpoint


def whole(checkpoint: Checkpoint, options: AskOptions, say: Reporter, session: Session) -> tuple[Model, Artefacts]:
    """All of a model with what stands beside its weights; what an earlier conversion added is taken off."""
    if checkpoint.default_part == LLM:
        raise InputError(
            f"{checkpoint.path} is a language model alone: it sees no pictures",
            hint="give the whole LLaVA; of a GGUF, its mmproj beside it",
        )
    model = assemble(checkpoint, options.bases, session, weights=PARTS, configs=(LLM, VISION))
    refuse_ignored(model, options.adapters)
    model = without_added(model)
    for text in map(session.called, model.warnings):
        say.warn(text)
    return model, Artefacts(model, TargetOptions(prompt_template=options.prompt_template))


def _by_llama_cpp(checkpoint: Checkpoint, options: AskOptions) -> bool:
    fits = LLAMA_CPP in LAYOUTS[checkpoint.layout].loaders
    if options.runtime == LLAMA_CPP and not fits:
        raise UsageError(
            f"--runtime llama.cpp: {checkpoint.path.name} is {checkpoint.layout}, which llama.cpp does not read",
            hint="convert it with --to gguf, or leave --runtime out",
        )
    return fits and options.runtime in (None, LLAMA_CPP)


def _llama_cpp(checkpoint: Checkpoint, options: AskOptions) -> Runtime:
    asked = {"--dtype": options.dtype, "--4bit": options.four_bit, "--prompt-template": options.prompt_template}
    for flag, value in asked.items():
        if value:
            raise UsageError(
                f"{flag} does not apply to llama.cpp, which takes the file as it is",
                hint="leave it out, or add --runtime transformers",
            )
    return llama_cpp(checkpoint, gpu=options.device != "cpu")


def llama_cpp(checkpoint: Checkpoint, *, gpu: bool, exact: bool = False) -> LlamaCppRuntime:
    """GGUF in llama.cpp. Raises UsageError without xllamacpp and for files elsewhere, UnsupportedError of the file."""
    from llava_convert.app.ask.llama_cpp_runtime import LlamaCppRuntime

    if any(remote_of(path) is not None for path in checkpoint.files):
        raise UsageError("llama.cpp reads files of this machine", hint="add --cache, which downloads the model")
    tower = next(iter(checkpoint.parts[VISION].weights.values()), None)
    mmproj = tower.extents[0].path if tower is not None and tower.extents else None
    return LlamaCppRuntime(checkpoint.files[0], mmproj, gpu=gpu, exact=exact)


def llama_cpp_notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What llama.cpp is known to compute otherwise."""
    clip = (checkpoint.parts[VISION].config or {}).get("model_type") == "clip_vision_model"
    return (_CLASS_TOKEN,) if clip else ()
