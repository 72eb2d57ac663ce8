"""Damage without a fuzzer: the same for the same number, so that a failing test names what it did."""

from __future__ import annotations

import random
from collections.abc import Sequence

_NUMBERS = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x100, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)


def mutated(seeds: Sequence[bytes], words: Sequence[bytes], number: int, limit: int) -> bytes:
    """One of the seeds after one to five changes, at most `limit` bytes."""
    rng = random.Random(number)
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + int(rng.expovariate(0.2)) + 1)
        match rng.randrange(9):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.randrange(256)
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end] * rng.choice((1, 2, 30))
            case 4:
                size = rng.choice((1, 2, 4, 8))
                data[at : at + size] = (rng.choice(_NUMBERS) & (256**size - 1)).to_bytes(size, "little")
            case 5:
                data = data[: max(1, at)]
            case 6:
                other = rng.choice(seeds)
                start = rng.randrange(len(other) + 1)
                data[at:end] = other[start : start + rng.randrange(1, 60)]
            case 7 if words:
                data[at:at] = rng.choice(words)
            case 8 if words:
                data[at:end] = rng.choice(words)
    return bytes(data[:limit])
