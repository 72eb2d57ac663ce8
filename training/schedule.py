"""The learning rate: a linear warm-up, then a cosine to zero, counted in iterations as mmengine counts them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .recipe import TrainRecipe


@dataclass(frozen=True)
class Schedule:
    """`warmup` iterations from `start` of the peak up to it, then a cosine to 0 over the rest of `iterations`.

    In closed form what mmengine 0.10's LinearLR and CosineAnnealingLR compute step by step, their corner included: a
    warm-up of one iteration ends at `start`, not at the peak, since the cosine goes on from where it is. `of_recipe`
    leaves such a warm-up out where a recipe does not ask for mmengine's.
    """

    lr: float
    iterations: int
    warmup: int
    start: float

    @classmethod
    def of_recipe(cls, train: TrainRecipe, iterations: int, *, part: str = "") -> Schedule:
        """The schedule of a run, or of the rate of one of its parts."""
        warmup = int(train.warmup_ratio * iterations)
        if warmup == 1 and not train.mmengine_warmup:
            warmup = 0
        return cls(train.rate_of(part) if part else train.lr, iterations, warmup, train.warmup_start)

    def at(self, iteration: int) -> float:
        """The rate of an iteration, the first being 0."""
        iteration = min(iteration, self.iterations - 1)
        if iteration < self.warmup:
            share = iteration / (self.warmup - 1) if self.warmup > 1 else 0.0
            return self.lr * (self.start + (1 - self.start) * share)
        peak = self.lr * self.start if self.warmup == 1 else self.lr
        return peak * (1 + math.cos(math.pi * (iteration - self.warmup) / (self.iterations - self.warmup))) / 2

    def state(self, iteration: int, groups: Sequence[Schedule] = ()) -> list[dict[str, Any]]:
        """What mmengine's two schedulers hold after so many iterations, for the checkpoint.

        `groups` are the schedules of the optimiser's groups, which differ in their peaks alone; none: this one.
        """
        every = groups or (self,)
        common = {
            "param_name": "lr",
            "by_epoch": False,
            "base_values": [one.lr for one in every],
            "_global_step": iteration,
        }
        common["verbose"] = False
        warm, rest = self.warmup, self.iterations - self.warmup
        found = []
        if warm:
            last = iteration if iteration < warm else iteration - 1
            found.append(
                {
                    "start_factor": self.start,
                    "end_factor": 1.0,
                    "total_iters": warm - 1,
                    "begin": 0,
                    "end": warm,
                    "last_step": min(iteration, warm - 1),
                    "_last_value": [one.at(last) for one in every],
                    **common,
                }
            )
        found.append(
            {
                "T_max": rest,
                "eta_min": 0.0,
                "eta_min_ratio": None,
                "begin": warm,
                "end": self.iterations,
                "last_step": max(-1, min(iteration, self.iterations - 1) - warm),
                "_last_value": [one.at(iteration) for one in every],
                **common,
            }
        )
        return found
