"""Several processes of one job, as `accelerate launch` or torchrun start them."""

from __future__ import annotations

import os
from collections.abc import Callable

from llava_convert.core.values import dataclass


@dataclass(frozen=True)
class Processes:
    """This process among `count`; `wait` returns once all have called it."""

    rank: int
    count: int
    wait: Callable[[], None]

    @property
    def first(self) -> bool:
        return self.rank == 0


def speaks() -> bool:
    """Whether this process is the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def processes(*, cpu: bool) -> Processes:
    """Alone unless a launcher says otherwise; accelerate is not imported then."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes(0, 1, lambda: None)
    from accelerate import PartialState

    state = PartialState(cpu=cpu)
    return Processes(state.process_index, state.num_processes, state.wait_for_everyone)
