"""LLaVA's tokens: the real converter's ids, read back by real transformers; and the way back to the base tokenizer."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import AddedToken as LibraryToken
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoProcessor, AutoTokenizer

from llava_convert.assets.processor import preprocessor_config, processor_config
from llava_convert.assets.prompts import hf_templates
from llava_convert.assets.tokenizer.checks import require_shape
from llava_convert.assets.tokenizer.files import Tokenizer, open_tokenizer
from llava_convert.assets.tokenizer.llava_tokens import (
    AddedToken,
    TokenPlan,
    plain_files,
    plan_llava_tokens,
    undo_record,
    with_tokens,
    without_tokens,
)
from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.storage.sidecars import folder_sidecars

TEXTS = ["What is in the picture?", "naïve café, 描述\n\n  two  spaces", "<|eot_id|>x</s>y", ""]
VISION = {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14}
BYTE_LEVEL_CONFIG = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|eot_id|>",
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def tokenizer_in(folder: Path) -> Tokenizer:
    return open_tokenizer(folder_sidecars(folder))


def byte_level(folder: Path, count: int, **config: Any) -> Path:
    """A tokenizer of Llama-3's kind with `count` tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ġ", "t"), ("h", "e"), ("i", "n")]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    made = LibraryTokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special += [f"<|reserved_{i}|>" for i in range(count - len(vocab) - len(special))]
    made.add_special_tokens([LibraryToken(token, normalized=False) for token in special])
    made.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", len(vocab))]
    )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(BYTE_LEVEL_CONFIG | config))
    return folder


def sentencepiece_like(folder: Path) -> Path:
    """A tokenizer of Llama-2's kind: byte fallback and Metaspace, `<unk>` `<s>` `</s>` first; 359 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    pieces += [chr(i) for i in range(33, 127)] + ["▁W", "▁t", "th", "in", "he"]
    merges = [("▁", "W"), ("▁", "t"), ("t", "h"), ("i", "n"), ("h", "e")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = LibraryTokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([LibraryToken(token, normalized=False) for token in pieces[:3]])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    return folder


def sentencepiece_model(pieces: list[str]) -> bytes:
    """The protobuf: field 1 a piece (1 the text, 2 a float, 3 an enum), and a field 2 which a reader must step over."""
    made = b""
    for piece in pieces:
        text = piece.encode()
        body = b"\x0a" + bytes([len(text)]) + text + b"\x15\x00\x00\x80\xbf" + b"\x18\x03"
        made += b"\x0a" + bytes([len(body)]) + body
    return made + b"\x12\xac\x02" + bytes(300) + b"\x18\xff\xff\x03"


def write(folder: Path, files: dict[str, bytes], **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for name, value in more.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def hf_folder(folder: Path, base: Path, rows: int, prompt: str | None = None) -> tuple[Path, TokenPlan]:
    """What a conversion writes of tokenizer and processor, with a config.json by which the Auto classes choose."""
    tokenizer = tokenizer_in(base)
    plan = plan_llava_tokens(tokenizer, rows)
    templates = hf_templates(tokenizer, prompt)
    files = with_tokens(tokenizer, plan, chat_template=templates.tokenizer, processor_template=templates.processor)
    config = {
        "model_type": "llava",
        "image_token_index": plan.image_id,
        "text_config": {"model_type": "llama", "vocab_size": plan.rows_out},
        "vision_config": VISION,
    }
    return write(
        folder,
        files,
        config=config,
        preprocessor_config=preprocessor_config(None, VISION, "clip", True),
        processor_config=processor_config(VISION),
    ), plan


# FORMATS-xtuner, "Tokenizer and vocabulary": tokens, rows -> image id, pad id, rows out. In the row of 510 tokens the
# real converter writes 512 rows, so that its pad id has none; here every id has one.
@pytest.mark.parametrize(
    ("tokens", "rows", "image", "pad", "rows_out"),
    [
        (512, 512, 513, 514, 576),
        (500, 500, 501, 502, 512),
        (511, 511, 512, 513, 576),
        (510, 510, 511, 512, 576),
        (512, 576, 513, 514, 576),
        (509, 509, 510, 511, 512),
    ],
)
def test_ids_are_the_real_converters(
    tmp_path: Path, tokens: int, rows: int, image: int, pad: int, rows_out: int
) -> None:
    base = byte_level(tmp_path / "base", tokens)
    assert tokenizer_in(base).size == tokens
    folder, plan = hf_folder(tmp_path / "hf", base, rows)
    assert (plan.image_id, plan.pad_id, plan.rows_out) == (image, pad, rows_out)
    assert plan.added == (AddedToken(tokens, "<unk>"), AddedToken(image, "<image>"), AddedToken(pad, "<pad>"))
    assert max(plan.image_id, plan.pad_id) < plan.rows_out
    read = AutoTokenizer.from_pretrained(folder)
    assert read.encode("<image><pad><unk>", add_special_tokens=False) == [image, pad, tokens]
    assert (read.pad_token_id, read.unk_token_id, len(read)) == (pad, tokens, pad + 1)


def test_llama_3s_ids(tmp_path: Path) -> None:
    vocab = {f"t{i}": i for i in range(128000)}
    added = [{"id": i, "content": f"<|{i}|>"} for i in range(128000, 128256)]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {"vocab": vocab}}))
    plan = plan_llava_tokens(tokenizer_in(tmp_path), 128256)
    assert (plan.image_id, plan.pad_id, plan.rows_out) == (128257, 128258, 128320)


def test_sentencepiece_llama_has_its_unk(tmp_path: Path) -> None:
    base = sentencepiece_like(tmp_path / "base")
    tokenizer = tokenizer_in(base)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.unk, tokenizer.pad) == ("<s>", "</s>", "<unk>", None)
    assert tokenizer.size == 359
    folder, plan = hf_folder(tmp_path / "hf", base, 359)
    assert (plan.image_id, plan.pad_id, plan.rows_out) == (359, 360, 384)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer"
    # 4.x passes these fields to AddedToken as they are, which knows no __type.
    special = json.loads((folder / "special_tokens_map.json").read_text())
    assert special["bos_token"] == {"content": "<s>", "lstrip": False, "normalized": False}
    # A slow tokenizer has nothing but these two.
    assert json.loads((folder / "added_tokens.json").read_text()) == {"<image>": 359, "<pad>": 360}
    assert (folder / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    read, library = AutoTokenizer.from_pretrained(folder), LibraryTokenizer.from_file(str(base / "tokenizer.json"))
    assert read.encode("<image><pad>", add_special_tokens=False) == [359, 360]
    for text in TEXTS:
        assert read.encode(text) == library.encode(text).ids


def test_an_unk_stated_as_null_adds_none(tmp_path: Path) -> None:
    # transformers 4.43.4: LlamaTokenizerFast.from_pretrained keeps the null, and len() stays 512.
    plan = plan_llava_tokens(tokenizer_in(byte_level(tmp_path, 512, unk_token=None)), 512)
    assert (plan.image_id, plan.pad_id, plan.rows_out) == (512, 513, 576)


def test_existing_tokens_are_reused_and_the_file_is_the_very_bytes(tmp_path: Path) -> None:
    once, plan = hf_folder(tmp_path / "once", byte_level(tmp_path / "base", 300), 300)
    again, second = hf_folder(tmp_path / "again", once, plan.rows_out)
    assert second == TokenPlan(plan.ids, (), plan.rows_out)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        assert (once / name).exists() == (again / name).exists()
        if (once / name).exists():
            assert (again / name).read_bytes() == (once / name).read_bytes(), name


def test_a_piece_of_the_vocabulary_keeps_its_id_and_becomes_a_token(tmp_path: Path) -> None:
    base = byte_level(tmp_path / "base", 300)
    parsed = json.loads((base / "tokenizer.json").read_text())
    parsed["model"]["vocab"]["<image>"] = parsed["model"]["vocab"].pop("in")
    parsed["model"]["merges"].pop()
    image = parsed["model"]["vocab"]["<image>"]
    (base / "tokenizer.json").write_text(json.dumps(parsed))
    folder, plan = hf_folder(tmp_path / "hf", base, 300)
    assert (plan.image_id, plan.pad_id) == (image, 301)
    assert AutoTokenizer.from_pretrained(folder).encode("<image>", add_special_tokens=False) == [image]


def test_fewer_rows_than_tokens_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="300 tokens, but the embedding only 299 rows"):
        plan_llava_tokens(tokenizer_in(byte_level(tmp_path, 300)), 299)


@pytest.mark.parametrize("stated", ["LlamaTokenizer", "LlamaTokenizerFast", "TokenizersBackend", None])
def test_a_byte_level_tokenizer_gets_a_class_that_loads_everywhere(tmp_path: Path, stated: str | None) -> None:
    base = byte_level(tmp_path / "base", 300, tokenizer_class=stated)
    folder, _ = hf_folder(tmp_path / "hf", base, 300)
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    library = LibraryTokenizer.from_file(str(base / "tokenizer.json"))
    read = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert read.encode(text) == library.encode(text).ids


def test_extra_special_tokens_of_transformers_5_get_their_old_name(tmp_path: Path) -> None:
    base = byte_level(tmp_path / "base", 300, extra_special_tokens=["<|reserved_0|>"], backend="tokenizers")
    folder, _ = hf_folder(tmp_path / "hf", base, 300)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in config
    assert config["additional_special_tokens"] == ["<|reserved_0|>"]
    assert "<|reserved_0|>" in AutoTokenizer.from_pretrained(folder).all_special_tokens


@pytest.mark.parametrize("prompt", ["llama3_chat", None])
def test_golden(tmp_path: Path, golden: Path, prompt: str | None) -> None:
    base, real = golden / "parts/plain/llm", golden / "cases/a_full_vitlora/huggingface"
    folder, plan = hf_folder(tmp_path / "hf", base, 512, prompt)
    theirs = json.loads((real / "config.json").read_text())
    assert plan.image_id == theirs["image_token_index"] == 513
    assert plan.pad_id == theirs["pad_token_id"] == 514
    assert plan.rows_out == theirs["text_config"]["vocab_size"] == 576
    for name, keys in {
        "tokenizer.json": ("added_tokens", "model", "normalizer", "pre_tokenizer", "decoder"),
        "tokenizer_config.json": ("added_tokens_decoder", "bos_token", "eos_token", "unk_token", "pad_token"),
    }.items():
        ours, wanted = json.loads((folder / name).read_text()), json.loads((real / name).read_text())
        assert {key: ours[key] for key in keys} == {key: wanted[key] for key in keys}
    # Every byte but those of the new entries is the base's.
    old, new = (base / "tokenizer.json").read_text(), (folder / "tokenizer.json").read_text()
    head, tail = old.split('\n  ],\n  "normalizer"', 1)
    assert new.startswith(head)
    assert new.endswith(tail)
    read = AutoTokenizer.from_pretrained(folder)
    ours, library = AutoTokenizer.from_pretrained(base), LibraryTokenizer.from_file(str(real / "tokenizer.json"))
    for text in TEXTS:
        assert read.encode(text) == ours.encode(text) == library.encode(text).ids


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("prompt", ["llama3_chat", "vicuna"])
def test_one_bos_and_sixteen_image_tokens_by_every_route(tmp_path: Path, kind: str, prompt: str) -> None:
    base = byte_level(tmp_path / "base", 300) if kind == "byte_level" else sentencepiece_like(tmp_path / "base")
    folder, plan = hf_folder(tmp_path / "hf", base, 512, prompt)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "LlavaProcessor"
    picture = Image.new("RGB", (80, 60), (200, 30, 30))
    bos = processor.tokenizer.bos_token_id
    question = {"type": "text", "text": "What is it?"}
    plain = [{"role": "user", "content": [{"type": "image"}, question]}]
    text = processor.apply_chat_template(plain, add_generation_prompt=True)
    two_steps = processor(images=picture, text=text)["input_ids"][0]
    shown = [{"role": "user", "content": [{"type": "image", "image": picture}, question]}]
    one_step = processor.apply_chat_template(shown, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert list(one_step["input_ids"][0]) == list(two_steps)
    assert list(two_steps).count(plan.image_id) == (56 // 14) ** 2
    assert (two_steps[0], list(two_steps).count(bos)) == (bos, 1)
    assert processor.image_token_id == plan.image_id
    # The tokenizer alone adds no BOS to a chat, so its template writes it.
    said = [{"role": "user", "content": "What is it?"}]
    alone = AutoTokenizer.from_pretrained(folder).apply_chat_template(said, tokenize=True, return_dict=False)
    assert (alone[0], list(alone).count(bos)) == (bos, 1)
    # A prompt written by hand gets one too, as it did with the base.
    assert list(processor.tokenizer("What?")["input_ids"]).count(bos) == 1


def test_the_template_is_in_both_places(tmp_path: Path, golden: Path) -> None:
    folder, _ = hf_folder(tmp_path, golden / "parts/plain/llm", 512)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (folder / "chat_template.jinja").read_text()
    assert config["processor_class"] == "LlavaProcessor"
    assert json.loads((folder / "chat_template.json").read_text())["chat_template"] != config["chat_template"]


@pytest.mark.parametrize("prompt", ["llama3_chat", None])
def test_the_way_back_is_the_base_tokenizer(tmp_path: Path, golden: Path, prompt: str | None) -> None:
    round_trip(tmp_path, golden / "parts/plain/llm", 512, prompt)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_the_way_back_of_made_tokenizers(tmp_path: Path, kind: str) -> None:
    if kind == "byte_level":
        base = byte_level(tmp_path / "base", 300, pad_token="<|reserved_1|>", tokenizer_class="LlamaTokenizer")
        compact = json.dumps(json.loads((base / "tokenizer.json").read_text()), separators=(",", ":"))
        (base / "tokenizer.json").write_text(compact, encoding="utf-8")
    else:
        base = sentencepiece_like(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    round_trip(tmp_path, base, 512, None)


def round_trip(tmp_path: Path, base: Path, rows: int, prompt: str | None) -> None:
    tokenizer = tokenizer_in(base)
    folder, plan = hf_folder(tmp_path / "hf", base, rows, prompt)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    record = json.loads(json.dumps(undo_record(plain_files(tokenizer), plan, files)))
    recorded = [AddedToken.of(json.loads(json.dumps(token.record()))) for token in plan.added]
    back = without_tokens(tokenizer_in(folder), recorded, record)
    assert set(back) == set(tokenizer.files)
    for name, data in back.items():
        if name.endswith(".json"):
            assert json.loads(data) == json.loads(tokenizer.read(name)), name
        else:
            assert data == tokenizer.read(name), name
    # Without the record the tokens go all the same, and what names them.
    bare = without_tokens(tokenizer_in(folder), recorded)
    assert json.loads(bare["tokenizer.json"]) == json.loads(tokenizer.read("tokenizer.json"))
    config = json.loads(bare["tokenizer_config.json"])
    assert "<image>" not in json.dumps(config.get("added_tokens_decoder"))
    assert "pad_token" not in config
    assert "processor_class" not in config


def test_plain_files_are_the_base_bytes(tmp_path: Path) -> None:
    base = byte_level(tmp_path, 300)
    tokenizer = tokenizer_in(base)
    assert plain_files(tokenizer) == {name: (base / name).read_bytes() for name in tokenizer.files}
    changed = plain_files(tokenizer, "{{ messages }}")
    assert changed["tokenizer.json"] == (base / "tokenizer.json").read_bytes()
    config = json.loads(changed["tokenizer_config.json"])
    assert config == BYTE_LEVEL_CONFIG | {"chat_template": "{{ messages }}"}
    (base / "chat_template.jinja").write_text("old")
    (base / "chat_template.json").write_text('{"chat_template": "old"}')
    changed = plain_files(tokenizer_in(base), "{{ messages }}")
    assert changed["chat_template.jinja"] == b"{{ messages }}"
    assert json.loads(changed["chat_template.json"]) == {"chat_template": "{{ messages }}"}


def test_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    base = sentencepiece_like(tmp_path)
    (base / "tokenizer.json").unlink()
    (base / "added_tokens.json").write_text('{"<pad>": 359}')
    tokenizer = tokenizer_in(base)
    assert tokenizer.size == 360
    assert [tokenizer.id_of(token) for token in ("<unk>", "</s>", "▁", "<pad>", "no")] == [0, 2, 259, 359, None]
    plan = plan_llava_tokens(tokenizer, 360)
    assert (plan.image_id, plan.pad_id, plan.rows_out) == (360, 359, 384)
    files = with_tokens(tokenizer, plan)
    assert json.loads(files["added_tokens.json"]) == {"<pad>": 359, "<image>": 360}
    decoder = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]
    assert {i: entry["content"] for i, entry in decoder.items()} == {"359": "<pad>", "360": "<image>"}
    assert decoder["360"]["special"] is True


@pytest.mark.parametrize("cut", [1, 5, 40, 2000])
def test_a_damaged_sentencepiece_model_is_an_input_error(tmp_path: Path, cut: int) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(["<unk>", "a"])[:-cut] + b"\x0a\x7f")
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        _ = tokenizer_in(tmp_path).size


def test_a_tiktoken_file_is_unsupported(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(UnsupportedError, match="tiktoken"):
        _ = tokenizer_in(tmp_path).size


def test_vocab_and_merges(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("a b\n")
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"2": {"content": "<e>"}}}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<e>"}}')
    tokenizer = tokenizer_in(tmp_path)
    assert (tokenizer.size, tokenizer.id_of("<e>"), tokenizer.eos) == (3, 2, "<e>")


def test_unigram_vocabulary(tmp_path: Path) -> None:
    model = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.5]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": model}))
    tokenizer = tokenizer_in(tmp_path)
    assert (tokenizer.size, tokenizer.id_of("a")) == (2, 1)


def test_no_tokenizer_and_broken_json_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        tokenizer_in(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[1")
    with pytest.raises(InputError, match="not JSON"):
        _ = tokenizer_in(tmp_path).size
    (tmp_path / "tokenizer.json").write_text("[1]")
    with pytest.raises(InputError, match="expected a JSON object, found list"):
        _ = tokenizer_in(tmp_path).size


@pytest.mark.parametrize(
    ("merges", "sound"),
    [
        (["a b", "ab c"], True),
        ([["a", "b"], ["a b", "c"]], True),
        (["a b", ["a", "b"]], True),
        ([], True),
        (None, True),
        ([["a", 1]], False),
        ([["a", "b", "c"]], False),
        ([[]], False),
        (["a b", None], False),
        ("a b", False),
    ],
)
def test_merges_are_pairs_of_tokens(merges: object, sound: bool) -> None:
    """A number in a pair ended a conversion to GGUF as a bug of the program's."""
    path = Path("tokenizer.json")
    expected = nullcontext() if sound else pytest.raises(InputError, match="model is not what a tokenizer has there")
    with expected:
        require_shape("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": merges}}, path)
