"""The vocabulary of a SentencePiece model, by walking its protobuf instead of importing sentencepiece."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from llava_convert.errors import InputError, UnsupportedError


def read_pieces(data: bytes, path: Path) -> list[str]:
    """The pieces of the model file `path`, whose bytes are `data`, in the order of their ids.

    sentencepiece_model.proto: field 1 of ModelProto is a piece, and field 1 of a piece its text. Raises InputError for
    a damaged file, UnsupportedError for tiktoken's text format, which Llama-3 ships under the same name.
    """
    if re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", data):
        raise UnsupportedError(f"{path}: a tiktoken file, not SentencePiece", hint="supply the model's tokenizer.json")
    try:
        texts = [dict(_fields(piece)).get(1) for number, piece in _fields(data) if number == 1]
        return [text.decode() for text in texts]  # type: ignore[union-attr]
    except (AttributeError, IndexError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path}: not a SentencePiece model ({error})") from error


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a protobuf message as (number, payload); varints come as an empty payload."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind, length = key & 7, 0
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 2:
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
