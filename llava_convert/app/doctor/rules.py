"""Problems that programs have with a LLaVA: each rule with the programs it concerns, its source and its repair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from llava_convert.app.adapters import beside as adapter_beside
from llava_convert.app.doctor.folder import GENERATION, PREPROCESSOR, PROCESSOR, Folder
from llava_convert.app.doctor.templates import takes_lists, turn_end
from llava_convert.assets.processor import preprocessor_config, processor_config
from llava_convert.assets.prompts import wrap_chat_template
from llava_convert.assets.tokenizer.files import CONFIG as TOKENIZER
from llava_convert.assets.tokenizer.files import SPECIAL_MAP, TEMPLATE
from llava_convert.assets.tokenizer.llava_tokens import IMAGE_TOKEN
from llava_convert.core.tensors import TORCH_NAMES
from llava_convert.core.text import to_json
from llava_convert.core.values import dataclass
from llava_convert.model.checkpoint import LLM, VISION
from llava_convert.model.configs import old_flavour
from llava_convert.model.tables.facts import CONFIG

TRANSFORMERS, VLLM, LLAMA_CPP, OLLAMA = "transformers", "vllm", "llama.cpp", "ollama"
CONSUMERS = (TRANSFORMERS, VLLM, LLAMA_CPP, OLLAMA)
_HF, _GGUFS = (TRANSFORMERS, VLLM), (LLAMA_CPP, OLLAMA)
# The first and the last version of transformers that the rules know. No rule of another program depends on a version.
OLDEST, NEWEST = (4, 46), (5, 23)

# A conversion within a layout is refused unless an option asks for something: this one changes nothing else.
_CONVERT = "llava-convert convert DIR --to hf --max-shard-size 5GB -o OUT writes another one"
_ROWS = (
    "llava-convert convert DIR --to hf --max-shard-size 5GB --vocab tokens -o OUT writes one with a row for each token"
)
_GGUF = "llava-convert gguf DIR --to gguf --outtype TYPE -o OUT writes them anew"

Check = Callable[[Folder], Iterator[str]]
Fix = Callable[[Folder], None]


@dataclass(frozen=True)
class Rule:
    """What a consumer trips over.

    `check` tells what is wrong, a sentence each; `fix` changes the small files, None where only a conversion helps.
    `hint` is the next step where the small files cannot be repaired. `before` is the first version of the consumer that
    it no longer concerns. `source` is where it is known from.
    """

    name: str
    consumers: tuple[str, ...]
    check: Check
    fix: Fix | None
    source: str
    hint: str = _CONVERT
    before: tuple[int, int] | None = None

    def concerns(self, consumer: str, version: tuple[int, ...] | None) -> bool:
        if consumer not in self.consumers:
            return False
        return self.before is None or version is None or consumer != TRANSFORMERS or version < self.before


def _vision(folder: Folder) -> dict[str, Any]:
    return dict(folder.checkpoint.parts[VISION].config or {})


def _strategy(folder: Folder) -> str:
    return folder.checkpoint.settings.select_strategy


def _rows(folder: Folder) -> int:
    embedding = next(
        (
            t
            for n, t in folder.checkpoint.parts[LLM].weights.items()
            if n.endswith(("embed_tokens.weight", "tok_embeddings.weight"))
        ),
        None,
    )
    return embedding.shape[0] if embedding is not None else 0


def _text_config(folder: Folder) -> dict[str, Any]:
    return dict(folder.json(CONFIG).get("text_config") or {})


def _vocab_size(folder: Folder) -> Iterator[str]:
    said, rows = _text_config(folder).get("vocab_size"), _rows(folder)
    if rows and isinstance(said, int) and said != rows:
        yield f"{CONFIG}: the vocab_size of text_config is {said}, and the embedding has {rows} rows"


def _fix_vocab_size(folder: Folder) -> None:
    rows, top = _rows(folder), folder.json(CONFIG)
    more = {"vocab_size": rows} if "vocab_size" in top else {}
    folder.set(CONFIG, {"text_config": {**_text_config(folder), "vocab_size": rows}, **more})


def _tokens(folder: Folder) -> Iterator[str]:
    ids, rows = folder.tokenizer.vocabulary.values() if folder.tokenizer is not None else (), _rows(folder)
    beyond = sorted(i for i in ids if rows and i >= rows)
    if beyond:
        named = {i: token for token, i in folder.tokenizer.vocabulary.items()} if folder.tokenizer is not None else {}
        yield (
            f"{len(beyond)} of the tokenizer's ids, from {beyond[0]} ({named[beyond[0]]}) on, have no row in the "
            f"embedding, which has {rows}"
        )


def _processor(folder: Folder) -> Iterator[str]:
    found = folder.json(PROCESSOR)
    if not folder.has(PROCESSOR):
        yield f"there is no {PROCESSOR}: the processor does not know how many tokens a picture is"
        return
    for key, value in processor_config(_vision(folder), _strategy(folder)).items():
        if (
            key in ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")
            and found.get(key) != value
        ):
            yield f"{PROCESSOR}: {key} is {found.get(key)!r}, the vision tower needs {value!r}"


def _fix_processor(folder: Folder) -> None:
    folder.set(PROCESSOR, processor_config(_vision(folder), _strategy(folder)))


def _image_token(folder: Folder) -> Iterator[str]:
    config, token = folder.json(CONFIG), folder.id_of(IMAGE_TOKEN)
    said = config.get("image_token_index")
    if token is None:
        yield f"the tokenizer has no {IMAGE_TOKEN}, which stands for a picture"
    elif said != token:
        yield f"{CONFIG}: image_token_index is {said!r}, and the tokenizer's {IMAGE_TOKEN} is {token}"


def _fix_image_token(folder: Folder) -> None:
    if (token := folder.id_of(IMAGE_TOKEN)) is not None:
        folder.set(CONFIG, {"image_token_index": token})


def _pad(folder: Folder) -> Iterator[str]:
    said, rows = folder.json(CONFIG).get("pad_token_id"), _rows(folder)
    if isinstance(said, int) and rows and not 0 <= said < rows:
        yield f"{CONFIG}: pad_token_id is {said}, and the embedding has {rows} rows"
    elif said is None and folder.id_of(folder.token("pad_token")) is not None:
        yield f"{CONFIG}: no pad_token_id, though the tokenizer has {folder.token('pad_token')}"


def _fix_pad(folder: Folder) -> None:
    for name in ("pad_token", "unk_token", "eos_token"):
        token = folder.id_of(folder.token(name))
        if token is not None and token < _rows(folder):
            folder.set(CONFIG, {"pad_token_id": token})
            return


def _stops(folder: Folder) -> list[int]:
    said = folder.json(GENERATION).get("eos_token_id")
    return [i for i in (said if isinstance(said, list) else [said]) if type(i) is int]


def _needed_stops(folder: Folder) -> list[int]:
    tokens = (folder.token("eos_token"), turn_end(folder))
    return [i for token in tokens if (i := folder.id_of(token)) is not None]


def _generation(folder: Folder) -> Iterator[str]:
    for token in dict.fromkeys(_needed_stops(folder)):
        if token not in _stops(folder):
            name = (
                next((str(t) for t, i in folder.tokenizer.vocabulary.items() if i == token), "")
                if folder.tokenizer
                else ""
            )
            yield f"{GENERATION}: eos_token_id lacks {token} ({name}), so that answers do not end there"


def _fix_generation(folder: Folder) -> None:
    ids = list(dict.fromkeys([*_stops(folder), *_needed_stops(folder)]))
    folder.set(GENERATION, {"eos_token_id": ids if len(ids) > 1 else ids[0]})


def _eos(folder: Folder) -> Iterator[str]:
    end, eos = turn_end(folder), folder.token("eos_token")
    if end is not None and eos != end:
        yield (
            f"{TOKENIZER}: eos_token is {eos}, and the chat template ends turns with {end}: a program that stops at "
            "the tokenizer's EOS alone never stops (lmms-eval's llava_hf)"
        )


def _fix_eos(folder: Folder) -> None:
    end = turn_end(folder)
    folder.set(TOKENIZER, {"eos_token": end})
    if folder.has(SPECIAL_MAP):
        folder.set(SPECIAL_MAP, {"eos_token": end})


def _no_template(folder: Folder) -> Iterator[str]:
    if folder.template is None:
        yield "there is no chat template: every program prompts as it likes"


def _lists(folder: Folder) -> Iterator[str]:
    found = folder.processor_template or folder.template
    if found is not None and not takes_lists(folder, found):
        yield 'the chat template takes no list content ({"type": "image"}), which pictures come in'


def _fix_lists(folder: Folder) -> None:
    found = folder.processor_template or folder.template
    assert found is not None
    made = wrap_chat_template(found, writes_bos=folder.tokenizer is None or not folder.tokenizer.adds_bos)
    folder.put(TEMPLATE, made)
    folder.set("chat_template.json", {"chat_template": made})


def _processor_template(folder: Folder) -> Iterator[str]:
    if folder.template is not None and folder.processor_template is None:
        yield f"the chat template is the tokenizer's alone, without {TEMPLATE}: the processor has none"


def _rope(folder: Folder) -> Iterator[str]:
    text = folder.json(CONFIG).get("text_config") or {}
    if "rope_parameters" in text and "rope_theta" not in text:
        yield f"{CONFIG}: rope_parameters alone: older versions then compute with a rope base of 10000"


def _fix_rope(folder: Folder) -> None:
    text = folder.json(CONFIG)["text_config"]
    old = old_flavour(text)
    said = {key: old.get(key) for key in ("rope_theta", "rope_scaling")}
    folder.set(CONFIG, {"text_config": {**text, **said}})


def _tokenizer_class(folder: Folder) -> Iterator[str]:
    if folder.json(TOKENIZER).get("tokenizer_class") == "TokenizersBackend":
        yield f"{TOKENIZER}: tokenizer_class TokenizersBackend, which transformers has from 5.0 on"


def _fix_tokenizer_class(folder: Folder) -> None:
    folder.set(TOKENIZER, {"tokenizer_class": "PreTrainedTokenizerFast"})


def _preprocessor(folder: Folder) -> Iterator[str]:
    if not folder.has(PREPROCESSOR):
        yield f"there is no {PREPROCESSOR}, without which older versions make no processor"
    if "image_processor" in folder.json(PROCESSOR):
        yield f"{PROCESSOR}: it holds an image_processor, which older versions take for an argument given twice"


def _fix_preprocessor(folder: Folder) -> None:
    base = folder.json(PROCESSOR).get("image_processor")
    made = preprocessor_config(base if isinstance(base, dict) else None, _vision(folder), kind="clip", for_hf=True)
    if not folder.has(PREPROCESSOR):
        folder.set(PREPROCESSOR, made)
    rest = {key: value for key, value in folder.json(PROCESSOR).items() if key != "image_processor"}
    folder.changed[PROCESSOR] = to_json(rest)


def _dialect(folder: Folder) -> Iterator[str]:
    for note in folder.checkpoint.notes:
        if note.startswith("names are in the"):
            yield f"the {note}, not in the classic one"


def _adapters(folder: Folder) -> Iterator[str]:
    if (name := adapter_beside(folder.root)) is not None:
        yield f"an adapter lies beside the model ({name}), which is ignored without a word"


def _dtypes(folder: Folder) -> Iterator[str]:
    found = Counter(tensor.dtype for tensor in folder.checkpoint.tensors().values() if tensor.dtype in TORCH_NAMES)
    if len(found) > 1:
        said = ", ".join(f"{count} tensors {TORCH_NAMES[dtype]}" for dtype, count in found.most_common())
        yield f"the weights are of several dtypes ({said}), at which several ways of loading end in an error"


def _gguf(folder: Folder) -> Iterator[str]:
    yield from folder.checkpoint.defects


def _mmproj(folder: Folder) -> Iterator[str]:
    if not folder.checkpoint.parts[VISION].weights:
        yield "there is no mmproj: the model sees no pictures"


def _modelfile(folder: Folder) -> Iterator[str]:
    if not any(name.lower().endswith("modelfile") for name in folder.beside.names()):
        yield "there is no Modelfile: `ollama create` takes none of the two files by itself"


RULES = (
    Rule(
        "names",
        (TRANSFORMERS,),
        _dialect,
        None,
        "loaded in ten versions from 4.37 to 5.23, where missing keys are a warning and random weights",
        before=(5, 6),
    ),
    Rule("names", (VLLM,), _dialect, None, "vllm/model_executor/models/llava.py, hf_to_vllm_mapper"),
    Rule("dtypes", _HF, _dtypes, None, 'output of xtuner\'s own converter in from_pretrained(dtype="auto")'),
    Rule(
        "adapters",
        _HF,
        _adapters,
        None,
        "transformers loads them by load_adapter alone, vLLM by a lora-modules option",
        "llava-convert convert DIR --adapter DIR --to hf -o OUT merges it",
    ),
    Rule(
        "image token",
        _HF,
        _image_token,
        _fix_image_token,
        "configuration_llava.py: 4.x reads image_token_index alone, and takes 32000 without it",
    ),
    Rule(
        "vocabulary",
        _HF,
        _vocab_size,
        _fix_vocab_size,
        "from_pretrained: size mismatch; vllm, vocab_parallel_embedding.py: assert shape == org_vocab_size",
    ),
    Rule("rows", _HF, _tokens, None, "IndexError in torch's embedding; on a GPU an assertion of the device", _ROWS),
    Rule(
        "pad id", _HF, _pad, _fix_pad, "generate() of a batch; lmdeploy marks pictures by it (InternLM/lmdeploy#3285)"
    ),
    Rule(
        "processor",
        _HF,
        _processor,
        _fix_processor,
        "processing_llava.py from 4.52 on: TypeError without patch_size, one token too few without the class token",
    ),
    Rule(
        "preprocessor",
        _HF,
        _preprocessor,
        _fix_preprocessor,
        "4.46 reads no nested image_processor (OSError, TypeError); 5.x writes nothing else",
        before=(4, 57),
    ),
    Rule(
        "tokenizer class",
        _HF,
        _tokenizer_class,
        _fix_tokenizer_class,
        "tokenization_auto.py of 4.57 does not know the class",
        before=(5, 0),
    ),
    Rule(
        "rope",
        _HF,
        _rope,
        _fix_rope,
        "configuration_llama.py of 4.x reads rope_theta, and takes 10000 without it",
        before=(5, 0),
    ),
    Rule(
        "template",
        _HF,
        _no_template,
        None,
        "apply_chat_template raises without one",
        "llava-convert convert DIR --to hf --prompt-template NAME -o OUT writes one",
    ),
    Rule(
        "processor template",
        _HF,
        _processor_template,
        _fix_lists,
        "processing_utils.py: from 4.52 on processor.chat_template is None then",
    ),
    Rule(
        "list content",
        _HF,
        _lists,
        _fix_lists,
        "processing_utils.py and vLLM's chat endpoint give templates list content",
    ),
    Rule(
        "tokenizer eos",
        _HF,
        _eos,
        _fix_eos,
        "lmms_eval/models/simple/llava_hf.py: generate(eos_token_id=tokenizer.eos_token_id)",
    ),
    Rule("stops", _HF, _generation, _fix_generation, "generate() and vLLM stop at generation_config's eos_token_id"),
    Rule("files", _GGUFS, _gguf, None, "each key and tensor left out, and the rest loaded by llama.cpp", _GGUF),
    Rule(
        "mmproj",
        _GGUFS,
        _mmproj,
        None,
        "tools/mtmd: without --mmproj no picture is taken",
        "llava-convert convert SOURCE --to gguf -o OUT writes both files",
    ),
    Rule("modelfile", (OLLAMA,), _modelfile, None, "ollama create -f Modelfile", _GGUF),
)
