"""Llama-3's own tokenizer from the tiktoken file that the wheel `llama-models` carries (`build.py models` fetches it).

The file has one line a token: its bytes in base64, and its rank. `tokenizers` wants merges instead: every way to cut a
token into two tokens, in the order of the token's rank.
"""

from __future__ import annotations

import base64
from itertools import count
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

BEGIN, END_OF_TEXT, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
NAMED = {0: BEGIN, 1: END_OF_TEXT, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: END_OF_TURN}
SPECIALS = 256
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def ranks_file(venvs: Path) -> Path | None:
    """The file inside the environment `models`, or None when that is not built."""
    return next(venvs.glob("models/lib/python*/site-packages/llama_models/llama3/tokenizer.model"), None)


def _alphabet() -> list[str]:
    """The 256 characters by which byte-level BPE stands for bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = count(256)
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def special_tokens() -> list[str]:
    """The 256 specials of Llama-3 in order; those that no template uses are numbered as reserved."""
    spare = count()
    return [NAMED.get(place) or f"<|reserved_special_token_{next(spare)}|>" for place in range(SPECIALS)]


def read(ranks: Path) -> Tokenizer:
    """The tokenizer, which puts BOS in front of what it encodes: 128000 tokens and 256 specials."""
    letters = _alphabet()
    rank: dict[bytes, int] = {}
    for line in ranks.read_bytes().splitlines():
        token, number = line.split()
        rank[base64.b64decode(token)] = int(number)
    merges = []
    for token in rank:
        cuts = [(token[:at], token[at:]) for at in range(1, len(token)) if token[:at] in rank and token[at:] in rank]
        merges += sorted(cuts, key=lambda cut: (rank[cut[0]], rank[cut[1]]))
    merges.sort(key=lambda cut: rank[cut[0] + cut[1]])
    text = {token: "".join(letters[byte] for byte in token) for token in rank}
    vocabulary = {text[token]: number for token, number in rank.items()}
    pairs = [(text[left], text[right]) for left, right in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, fuse_unk=False, ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in special_tokens()])
    template = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer
