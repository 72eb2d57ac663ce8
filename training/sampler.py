"""The order of the data: batches of samples of one modality and of like lengths, so that little is padding.

The order is xtuner's (LengthGroupedSampler of 0.1.23, after transformers' and LLaVA's), for the same seed and number of
processes; so a run of the one can be taken up by the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class LengthGrouped(Sampler[int]):
    """Endless indices for one process, epoch after epoch, from the `start`th of the run on.

    `lengths` are in tokens, negative for samples without a picture (LLaVA's "modality lengths"). `group` is how many
    samples one process takes for one step of the optimiser.
    """

    def __init__(
        self, lengths: Sequence[int], group: int, *, seed: int, rank: int = 0, world: int = 1, start: int = 0
    ) -> None:
        self.start = start
        self.lengths, self.group, self.seed = lengths, group, seed
        self.rank, self.world = rank, world
        # Every process gets whole groups, the last filled up from the start of the order.
        self.samples = math.ceil(len(lengths) / world / group) * group

    def __len__(self) -> int:
        """Samples of one epoch, for one process."""
        return self.samples

    def epoch(self, number: int) -> list[int]:
        """The indices of this process in an epoch."""
        order = grouped_order(self.lengths, self.group * self.world, seed=self.seed + number)
        total = self.samples * self.world
        order = (order * (total // len(order) + 1))[:total]
        return order[self.rank :: self.world]

    def __iter__(self) -> Iterator[int]:
        number, skip = divmod(self.start, self.samples)
        while True:
            yield from self.epoch(number)[skip:]
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
