"""Damage to containers at the places that mean something: counts, offsets, types, lengths, names, texts inside."""

from __future__ import annotations

import io
import struct
import zipfile
from functools import cache
from pathlib import Path
from random import Random

from gguf import GGUFReader

from tests.fuzz.json_damage import damaged_json
from tests.fuzz.mutations import mutated

_NUMBERS = (
    0, 1, 2, 3, 4, 7, 8, 9, 10, 12, 13, 31, 32, 33, 0x7F, 0xFF, 0xFFFF, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40,
    2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
_TEXTS = (b"\xff", b"\0", b"\x1b[31m", b"../../x", b"llama", b"clip", b"x", b"\xed\xa0\x80")


def damaged_bytes(data: bytearray, spots: tuple[tuple[int, int], ...], rng: Random) -> bytes:
    """Bytes after one to three changes, most of them at one of the (offset, size) that have a meaning."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, size = rng.choice(spots)
        if at >= len(data):
            continue
        match rng.randrange(10):
            case 0:
                del data[at : at + rng.randrange(1, 9)]
            case 1:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 2:
                data[at] ^= 1 << rng.randrange(8)
            case 3 if size > 8:
                text = rng.choice(_TEXTS)
                start = at + rng.randrange(size)
                data[start : start + len(text)] = text
            case 4:
                there, length = rng.choice(spots)
                data[at : at + size], data[there : there + length] = (
                    data[there : there + length],
                    data[at : at + size],
                )
            case 5 if rng.random() < 0.3:
                del data[rng.randrange(len(data)) :]
            case 6 if rng.random() < 0.3:
                data += rng.randbytes(rng.randrange(1, 100))
            case 7 if size in (4, 8):
                form = "<f" if size == 4 else "<d"
                value = rng.choice((float("nan"), float("inf"), -1.0, 0.0, 3e38, 1e-30))
                data[at : at + size] = struct.pack(form, value)
            case _:
                width = size if size in (1, 2, 4, 8) else 1
                old = int.from_bytes(data[at : at + width], "little")
                value = rng.choice((*_NUMBERS, old + 1, old - 1, old * 2))
                data[at : at + width] = (value % 256**width).to_bytes(width, "little")
    return bytes(data)


@cache
def gguf_spots(path: Path) -> tuple[tuple[tuple[int, int], ...], ...]:
    """For each key and tensor of a GGUF file, where its parts lie: (offset, size), as gguf-py reads them."""
    reader = GGUFReader(path)
    found = []
    for field in (*reader.fields.values(), *(tensor.field for tensor in reader.tensors)):
        at, parts = field.offset, []
        for part in field.parts[:200]:
            parts.append((at, int(part.nbytes)))
            at += int(part.nbytes)
        found.append(tuple(parts))
    return tuple(found)


def damaged_gguf(data: bytes, rng: Random, fields: tuple[tuple[tuple[int, int], ...], ...]) -> bytes:
    few = (rng.choice(fields), rng.choice(fields), ((0, 4), (4, 4), (8, 8), (16, 8)) if rng.random() < 0.1 else ())
    return damaged_bytes(bytearray(data), tuple(spot for field in few for spot in field), rng)


def damaged_safetensors(data: bytes, rng: Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.2:
        return damaged_bytes(bytearray(data), ((0, 8), (0, 8), (8, length), (8, length), (8 + length, len(rest))), rng)
    made = damaged_json(header, rng, {})
    if rng.random() < 0.5:  # readers ask for a multiple of eight, and so do we
        made += b" " * (-len(made) % 8)
    return len(made).to_bytes(8, "little") + made + rest


def damaged_pth(data: bytes, rng: Random, words: tuple[bytes, ...], python: tuple[bytes, ...]) -> bytes:
    """A training checkpoint: its zip, its pickle with the CRC made right, or the config text inside the pickle."""
    way = rng.random()
    if way < 0.25:
        end = len(data)
        records = data.find(b"PK\x01\x02")
        spots = tuple((records + n, size) for n, size in ((4, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (42, 4)))
        first = tuple((n, size) for n, size in ((4, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)))
        tail = tuple((end - 22 + n, size) for n, size in ((0, 4), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)))
        anywhere = ((rng.randrange(records, end), 4), (rng.randrange(end), 4))
        return damaged_bytes(bytearray(data), (*spots, *first, *tail, *anywhere), rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        held = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in held if name.endswith("/data.pkl"))
    pickled = held[name]
    number = rng.randrange(2**32)
    if way < 0.6:
        at = pickled.find(b"cfgq") + len(b"cfgq\x05X")
        length = int.from_bytes(pickled[at : at + 4], "little")
        text = damaged_python(pickled[at + 4 : at + 4 + length], rng, python)
        held[name] = pickled[:at] + len(text).to_bytes(4, "little") + text + pickled[at + 4 + length :]
    else:
        held[name] = mutated([pickled], words, number, 1 << 20)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for inside, content in held.items():
            archive.writestr(inside, content)
    return made.getvalue()


def damaged_python(text: bytes, rng: Random, words: tuple[bytes, ...]) -> bytes:
    """A config: one value of it becomes another, a key goes, or the text is broken."""
    lines = text.split(b"\n")
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(lines))
        key, equals, value = lines[at].partition(b"=")
        match rng.randrange(6):
            case 0:
                del lines[at]
            case 1:
                return mutated([b"\n".join(lines)], words, rng.randrange(2**32), 1 << 16)
            case 2:
                lines.insert(rng.randrange(len(lines)), lines[at])
            case _ if equals:
                comma = b"," if value.endswith(b",") else b""
                odd = (b"None", b"-1", b"10**400", b"1e999", b"[]", b"dict()", b"'x'", b"True", b"lambda: 0", b"(1, )")
                more = (
                    b"'../../x'",
                    b"'\\ud800'",
                    b"b'x'",
                    b"2**40",
                    b"0",
                    b"'a' * 10**9",
                    b"[0] * 10**9",
                    b"0.5",
                    b"''",
                )
                lines[at] = key + equals + rng.choice((*odd, *more, *words)) + comma
    return b"\n".join(lines)


_YAML = (
    b"!!bool foo", b"!!timestamp abc", b"!!int ''", b"!!python/object/apply:os.system [x]", b"*x", b"&x [*x]", b"[[[[",
    b"|",
    b"{a: b", b"2001-13-45", b"2001-01-01", b"1e999", b".nan", b"0x", b"~", b"[]", b"{}", b"'", b"? x", b"<<: x", b"\t",
    b"'https://a.b/x)![..](https://c.d/p.png'", b"<script>alert(1)</script>", b"\x1b[31m", b"\xff", b'"\\ud800"', b"-1",
    b"https://a.b/?token=x", b"[1, two, {three: 4}]", b"yes", b"x" * 5000, b"&a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]",
    b"apache-2.0", b"!!binary x", b"!!set {x}", b"!!omap [x]", b"2001-01-01T00:00:00Z", b"12:30:45", b"---", b"...",
)  # fmt: skip


def damaged_card(text: bytes, rng: Random) -> bytes:
    """A model card: values of its front matter become others, lines of it go or are torn."""
    lines = text.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(lines))
        key, colon, _ = lines[at].partition(b":")
        match rng.randrange(8):
            case 0:
                del lines[at]
            case 1:
                lines.insert(at, rng.choice(lines))
            case 2:
                return mutated([b"\n".join(lines)], _YAML, rng.randrange(2**32), 1 << 16)
            case 3:
                lines.insert(at, b"  " + rng.choice(_YAML))
            case _ if colon:
                lines[at] = key + b": " + rng.choice(_YAML)
            case _:
                lines[at] = b"- " + rng.choice(_YAML)
        lines = lines or [b""]
    return b"\n".join(lines)
