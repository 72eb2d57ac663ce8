"""SentencePiece's model file, read and written as the protobuf that it is, without importing sentencepiece."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.values import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """One token. `type` is SentencePiece's: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""

    text: str
    score: float
    type: int


def read_pieces(data: bytes, path: Path) -> list[str]:
    """The texts of the pieces of a model file, in the order of their ids. Raises what `read_model` raises."""
    return [piece.text for piece in read_model(data, path)[0]]


def read_model(data: bytes, path: Path) -> tuple[list[Piece], bool]:
    """The pieces of the model file `path`, whose bytes are `data`, by id; and whether text gets a space in front.

    sentencepiece_model.proto: of ModelProto, field 1 is a piece (1 its text, 2 its score, 3 its type) and field 3 the
    normalizer's settings (3: add_dummy_prefix). Raises InputError for a damaged file, UnsupportedError for tiktoken's
    text format, which Llama-3 ships under the same name.
    """
    if is_tiktoken(data):
        raise UnsupportedError(f"{path}: a tiktoken file, not SentencePiece", hint="supply the model's tokenizer.json")
    pieces: list[Piece] = []
    prefix = True
    try:
        for number, content in _fields(data):
            if number == 1 and isinstance(content, bytes):
                fields = dict(_fields(content))
                score = struct.unpack("<f", fields.get(2, b"\0\0\0\0"))[0]  # type: ignore[arg-type]
                kind = fields.get(3, 1)
                pieces.append(Piece(fields[1].decode(), score, int(kind)))  # type: ignore[union-attr]
            elif number == 3 and isinstance(content, bytes):
                prefix = bool(dict(_fields(content)).get(3, 1))
    except (AttributeError, IndexError, KeyError, TypeError, UnicodeDecodeError, ValueError, struct.error) as error:
        raise InputError(f"{path}: not a SentencePiece model ({error})") from error
    return pieces, prefix


def is_tiktoken(data: bytes) -> bool:
    """Whether a tokenizer.model is tiktoken's text: base64 and a rank on each line."""
    return re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", data) is not None


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a protobuf message as (number, payload); a varint comes as its value."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind, length = key & 7, 0
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + length > len(data):
            raise ValueError(f"a field at byte {at} runs past the end")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"a varint at byte {at} is too long")


def write_model(pieces: Sequence[Piece], *, unk: int, bos: int, eos: int, prefix: bool) -> bytes:
    """A BPE model file of these pieces, as `read_model` and SentencePiece itself read it.

    Of sentencepiece_model.proto: trainer_spec is field 2 (3 model_type, 4 vocab_size, 35 byte_fallback, 40 to 43 the
    ids of unk, bos, eos and pad), normalizer_spec field 3 (1 name, 3 add_dummy_prefix, 4 remove_extra_whitespaces).
    """
    data = bytearray()
    for piece in pieces:
        kind = b"" if piece.type == 1 else _number(3, piece.type)
        data += _block(1, _block(1, piece.text.encode()) + b"\x15" + struct.pack("<f", piece.score) + kind)
    trainer = _number(3, 2) + _number(4, len(pieces)) + _number(35, 1)
    trainer += _number(40, unk) + _number(41, bos) + _number(42, eos) + _number(43, -1)
    normalizer = _block(1, b"identity") + _number(3, int(prefix)) + _number(4, 0) + _number(5, 1)
    return bytes(data + _block(2, trainer) + _block(3, normalizer))


def _block(field: int, content: bytes) -> bytes:
    return _encoded(field << 3 | 2) + _encoded(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _encoded(field << 3) + _encoded(value & (1 << 64) - 1)


def _encoded(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
