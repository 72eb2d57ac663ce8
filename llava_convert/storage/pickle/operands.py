"""What follows an opcode in a pickle's bytes: numbers, lines and texts, each of bounded size.

Formats: CPython's `Lib/pickletools.py`, class ArgumentDescriptor. Damaged numbers and texts raise ValueError.
"""

from __future__ import annotations

import codecs
import struct

from llava_convert.storage.pickle.globals import Elided
from llava_convert.storage.pickle.limits import MAX_INT_BYTES, MAX_NAME, MAX_TEXT, Costs, Hostile, Malformed


class Ends(Exception):
    """An operand runs past the end of the data."""


class Operands:
    """Reads `data` on from `pos`."""

    def __init__(self, data: bytes, pos: int, costs: Costs) -> None:
        self.data, self.pos, self._costs = data, pos, costs

    def take(self, count: int) -> bytes:
        chunk = self.data[self.pos : self.pos + count]
        if len(chunk) < count:
            raise Ends
        self.pos += count
        return chunk

    def line(self, limit: int = MAX_NAME) -> bytes:
        end = self.data.find(b"\n", self.pos, self.pos + limit + 1)
        if end < 0:
            if self.pos + limit < len(self.data):
                raise Malformed(f"a line of more than {limit} bytes")
            raise Ends
        chunk = self.data[self.pos : end]
        self.pos = end + 1
        return chunk

    # -- numbers ---------------------------------------------------------------------------------------------------

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def signed(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little", signed=True)

    def long(self, size_bytes: int) -> int:
        size = self.number(size_bytes)
        if size > MAX_INT_BYTES:
            raise Hostile(f"holds a number of {size:,} bytes")
        return self.signed(size)

    def float8(self) -> float:
        value: float = struct.unpack(">d", self.take(8))[0]
        return value

    def int_line(self) -> int:
        text = self.line()
        return text == b"01" if text in (b"00", b"01") else int(text)

    def long_line(self) -> int:
        return int(self.line(4 * MAX_INT_BYTES).rstrip(b"L"))

    def float_line(self) -> float:
        return float(self.line())

    # -- text ------------------------------------------------------------------------------------------------------

    def raw(self, size_bytes: int) -> bytes | Elided:
        """Bytes after their length; Elided where they are too many to keep."""
        count = self.number(size_bytes)
        if count <= MAX_TEXT:
            self._costs.text(count)
            return self.take(count)
        if count > len(self.data) - self.pos:
            raise Ends
        self.pos += count
        return Elided(count)

    def text(self, size_bytes: int) -> str | Elided:
        raw = self.raw(size_bytes)
        return raw if isinstance(raw, Elided) else raw.decode()

    def old_string(self, size_bytes: int) -> str | bytes | Elided:
        raw = self.raw(size_bytes)
        return raw if isinstance(raw, Elided) else _as_text(raw)

    def string_line(self) -> str | bytes:
        text = self._text_line()
        if len(text) < 2 or text[:1] not in (b"'", b'"') or text[-1:] != text[:1]:
            raise Malformed("a string without its quotes")
        return _as_text(codecs.escape_decode(text[1:-1])[0])

    def unicode_line(self) -> str:
        return self._text_line().decode("raw-unicode-escape")

    def _text_line(self) -> bytes:
        text = self.line(MAX_TEXT)
        self._costs.text(len(text))
        return text

    # -- about the pickle itself -----------------------------------------------------------------------------------

    def check_protocol(self) -> None:
        version = self.number(1)
        if version > 5:
            raise Malformed(f"pickle protocol {version}, of which nothing is known")

    def check_frame(self) -> None:
        if self.number(8) > len(self.data) - self.pos:
            raise Ends


def _as_text(raw: bytes) -> str | bytes:
    """A Python 2 str: text where it is UTF-8, as torch.load reads it, else the bytes."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw
