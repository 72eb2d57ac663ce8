"""The order of the data, epoch by epoch: a plain shuffle, or batches of one modality and of like lengths.

Both are xtuner 0.1.23's (mmengine's DefaultSampler; its own LengthGroupedSampler, after transformers' and LLaVA's), for
the same seed and number of processes; so a run of the one can be taken up by the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils.data import Sampler


class Order(Protocol):
    """The samples of one process in each epoch."""

    @property
    def samples(self) -> int:
        """How many one process takes in an epoch."""
        ...

    def epoch(self, number: int) -> list[int]:
        """Their indices, in order; the first epoch is 0."""
        ...


@dataclass(frozen=True)
class Shuffled:
    """Every sample once, at random; the last processes take some of the first ones again to have as many."""

    count: int
    seed: int
    rank: int = 0
    world: int = 1

    @property
    def samples(self) -> int:
        return math.ceil(self.count / self.world)

    def epoch(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + number)
        order = torch.randperm(self.count, generator=generator).tolist()
        return _share(order, self.samples, self.rank, self.world)


@dataclass(frozen=True)
class LengthGrouped:
    """Batches of like lengths, so that little is padding.

    `lengths` are in tokens, negative for samples without a picture (LLaVA's "modality lengths"). `group` is how many
    samples one process takes for one step of the optimiser: every process gets whole groups, the last filled up from
    the start of the order.
    """

    lengths: Sequence[int]
    group: int
    seed: int
    rank: int = 0
    world: int = 1

    @property
    def samples(self) -> int:
        return math.ceil(len(self.lengths) / self.world / self.group) * self.group

    def epoch(self, number: int) -> list[int]:
        order = grouped_order(self.lengths, self.group * self.world, seed=self.seed + number)
        return _share(order, self.samples, self.rank, self.world)


def _share(order: list[int], samples: int, rank: int, world: int) -> list[int]:
    total = samples * world
    return (order * (total // len(order) + 1))[:total][rank::world]


class Batches(Sampler[list[int]]):
    """Endless batches, epoch after epoch, from the `start`th of the run on. The last one of an epoch may be smaller."""

    def __init__(self, order: Order, size: int, *, start: int = 0) -> None:
        self.order, self.size, self.start = order, size, start

    def __len__(self) -> int:
        """Batches of one epoch."""
        return math.ceil(self.order.samples / self.size)

    def __iter__(self) -> Iterator[list[int]]:
        number, skip = divmod(self.start, len(self))
        while True:
            epoch = self.order.epoch(number)
            for at in range(skip * self.size, len(epoch), self.size):
                yield epoch[at : at + self.size]
            number, skip = number + 1, 0


def grouped_order(lengths: Sequence[int], batch: int, *, seed: int) -> list[int]:
    """Every index once. Megabatches of up to 50 batches are shuffled samples, each sorted by falling length."""
    generator = torch.Generator().manual_seed(seed)
    mega = max(1, min(len(lengths) // (batch * 4), 50)) * batch
    pictures = [i for i, n in enumerate(lengths) if n > 0]
    texts = [i for i, n in enumerate(lengths) if n < 0]
    if not pictures or not texts:
        # Compared with their sign, as the original does: texts alone then come shortest first.
        batches = _megabatches(range(len(lengths)), lengths, mega, generator)
    else:
        size = [abs(n) for n in lengths]
        first, second = (_megabatches(kind, size, mega, generator) for kind in (pictures, texts))
        # The last ones, which need not be full, go together to the end.
        left = first.pop() + second.pop()
        batches = first + second
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        batches.append(sorted(left, key=lambda i: size[i], reverse=True))
    # The longest sample comes first: what does not fit into memory shows at once.
    longest = max(range(len(batches)), key=lambda b: abs(lengths[batches[b][0]]))
    batches[0][0], batches[longest][0] = batches[longest][0], batches[0][0]
    return [i for one in batches for i in one]


def _megabatches(
    indices: Sequence[int], lengths: Sequence[int], size: int, generator: torch.Generator
) -> list[list[int]]:
    shuffled = [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
    groups = [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
    return [sorted(group, key=lambda i: lengths[i], reverse=True) for group in groups]
