"""The typed values of GGUF's metadata, as bytes and back.

The format is ggml's (docs/gguf.md, gguf.h): little-endian; a string is its length (u64) and its bytes; an array is the
type of its elements (u32), their number (u64) and the elements.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import Any

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.values import dataclass

# gguf.h, enum gguf_type: the number of a kind is its place here.
KINDS = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "[]", "u64", "i64", "f64")
_STRING, _ARRAY = KINDS.index("str"), KINDS.index("[]")
_FORMATS = {
    "u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "f32": "f", "bool": "?",
    "u64": "Q", "i64": "q", "f64": "d",
}  # fmt: skip
_U64 = struct.Struct("<Q")
_PIECE = 1 << 20
MANY = 4096  # elements: of a vocabulary
# Several times the header of the largest vocabulary (some 20 MB), and what keeps its values in a machine's memory.
MAX_HEADER_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Typed:
    """A value with its kind: "u8" … "f64", "bool", "str", or an array of one of them, "[u8]" … "[str]".

    Text that was read and is no UTF-8 holds its bytes as half surrogates (PEP 383), so that it is written back alike.
    """

    kind: str
    value: Any


def encode_string(text: str) -> bytes:
    # Of values llama.cpp asks no encoding, and gguf-py's writer takes tokens as bytes.
    data = text.encode("utf-8", "surrogateescape")
    return _U64.pack(len(data)) + data


def encode_value(typed: Typed) -> bytes:
    """The type and the value as they stand behind a key. Raises ValueError for a kind or value that GGUF lacks."""
    if not typed.kind.startswith("["):
        return struct.pack("<I", _number_of(typed.kind)) + _encode(typed.kind, (typed.value,))
    inner, values = typed.kind[1:-1], typed.value
    return struct.pack("<IIQ", _ARRAY, _number_of(inner), len(values)) + _encode(inner, values)


def _number_of(kind: str) -> int:
    if kind != "str" and kind not in _FORMATS:
        raise ValueError(f"{kind!r} is not a kind of value in GGUF, or of element")
    return KINDS.index(kind)


def _encode(kind: str, values: Sequence[Any]) -> bytes:
    if kind == "str":  # 400,000 tokens and merges in a vocabulary of Llama-3: no Python for each
        try:
            texts = list(map(str.encode, values))
        except UnicodeEncodeError:
            return b"".join(map(encode_string, values))
        sizes = list(map(len, texts))
        packed = {size: _U64.pack(size) for size in set(sizes)}
        parts = [b""] * (2 * len(texts))
        parts[::2], parts[1::2] = map(packed.__getitem__, sizes), texts
        return b"".join(parts)
    try:
        return struct.pack(f"<{len(values)}{_FORMATS[kind]}", *values)
    except (struct.error, OverflowError) as problem:
        raise ValueError(f"no values of {kind}: {problem}") from None


@dataclass(frozen=True, slots=True)
class Strings:
    """A vocabulary's array that was read from some file: how many bytes it had there, and their digest."""

    length: int
    digest: bytes
    values: tuple[str, ...]


class Cursor:
    """Reads a header front to back from a file of `size` bytes, no further than it must.

    `read` gives the bytes at an offset, fewer at the file's end. Every count is held against what is left of the file,
    and of MAX_HEADER_BYTES, before anything is made of it, so that a lie costs nothing. Raises InputError.

    `known` gathers vocabularies over several files: equal ones are made strings of once. Of Llama-3's each further one
    would take 35 MB and a fifth of a second.
    """

    def __init__(
        self, read: Callable[[int, int], bytes], size: int, where: str, known: list[Strings] | None = None
    ) -> None:
        self._read, self.size, self.where = read, size, where
        self._known = [] if known is None else known
        self._buffer = b""
        self._start = 0  # of the buffer in the file
        self._at = 0  # in the buffer
        self._digest = hashlib.sha256()  # of what was read since `_from` became 0, less what the buffer still holds
        self._from = 0  # in the buffer: where the rest begins

    @property
    def position(self) -> int:
        return self._start + self._at

    def _need(self, count: int, what: str) -> None:
        """Have `count` bytes in the buffer from where we stand."""
        if len(self._buffer) - self._at >= count:
            return
        if count > self.size - self.position:
            raise InputError(
                f"{self.where}: truncated: {what} at byte {self.position:,} wants {count:,} bytes, the file has "
                f"{max(0, self.size - self.position):,} more",
                hint="the download is incomplete, or the file is damaged; get it again",
            )
        if self.position + count > MAX_HEADER_BYTES:
            raise InputError(
                f"{self.where}: {what} at byte {self.position:,} wants {count:,} bytes: a header of more than "
                f"{MAX_HEADER_BYTES:,}, which no model has",
                hint="the file is damaged; get it again",
            )
        self._digest.update(self._buffer[self._from : self._at])
        self._start, self._at, self._from = self.position, 0, 0
        self._buffer = self._read(self._start, max(count, _PIECE))
        if len(self._buffer) < count:
            raise InputError(f"{self.where}: truncated while it was read")

    def take(self, count: int, what: str) -> bytes:
        self._need(count, what)
        found = self._buffer[self._at : self._at + count]
        self._at += count
        return found

    def number(self, kind: str, what: str) -> Any:
        form = struct.Struct(f"<{_FORMATS[kind]}")
        return form.unpack(self.take(form.size, what))[0]

    def name(self, what: str, limit: int) -> str:
        """A key or the name of a tensor: UTF-8, of at most `limit` bytes."""
        length = self.number("u64", what)
        if length > limit:
            raise InputError(f"{self.where}: {what} is said to have {length:,} bytes, more than any ({limit:,})")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise InputError(f"{self.where}: {what} at byte {self.position:,} is not UTF-8") from None

    def value(self, what: str) -> Typed:
        """A typed value. Raises UnsupportedError for a type that this version of the format does not know."""
        number = self.number("u32", what)
        if number != _ARRAY:
            kind = self._kind(number, what)
            return Typed(kind, self._strings(1, what)[0] if kind == "str" else self.number(kind, what))
        number = self.number("u32", what)
        if number == _ARRAY:
            raise UnsupportedError(f"{self.where}: {what} is an array of arrays, which no llama.cpp file holds")
        inner = self._kind(number, what)
        count = self.number("u64", what)
        return Typed(f"[{inner}]", self._strings(count, what) if inner == "str" else self._numbers(inner, count, what))

    def _kind(self, number: int, what: str) -> str:
        if number >= len(KINDS):
            raise UnsupportedError(f"{self.where}: {what} has a value of the unknown type {number}")
        return KINDS[number]

    def _numbers(self, kind: str, count: int, what: str) -> tuple[Any, ...]:
        form = _FORMATS[kind]
        return struct.unpack(f"<{count}{form}", self.take(count * struct.calcsize(form), what))

    def _strings(self, count: int, what: str) -> tuple[str, ...]:
        """A vocabulary has some 400,000 of them: a loop over locals, refilled when the buffer runs out."""
        if count * 8 > self.size - self.position:
            raise InputError(
                f"{self.where}: {what} is said to hold {count:,} strings, more than the file has room for",
                hint="the file is damaged; get it again",
            )
        for one in self._known if count >= MANY else ():
            if len(one.values) == count and self._passes(one):
                return one.values
        start, self._digest, self._from = self.position, hashlib.sha256(), self._at
        found: list[str] = []
        unpack, add = _U64.unpack_from, found.append
        buffer, at = self._buffer, self._at
        for _ in range(count):
            if len(buffer) - at < 8:
                self._at = at
                self._need(8, what)
                buffer, at = self._buffer, self._at
            (length,) = unpack(buffer, at)
            at += 8
            if len(buffer) - at < length:
                self._at = at
                self._need(length, what)
                buffer, at = self._buffer, self._at
            add(buffer[at : at + length].decode("utf-8", "surrogateescape"))
            at += length
        self._at = at
        values = tuple(found)
        if count >= MANY:
            self._digest.update(self._buffer[self._from : at])
            self._known.append(Strings(self.position - start, self._digest.digest(), values))
        return values

    def _passes(self, one: Strings) -> bool:
        """Whether the next bytes are those of an array that was read before, which are then behind us."""
        if one.length > min(self.size, MAX_HEADER_BYTES) - self.position:
            return False
        self._need(one.length, "a vocabulary")
        if hashlib.sha256(memoryview(self._buffer)[self._at : self._at + one.length]).digest() != one.digest:
            return False
        self._at += one.length
        return True
