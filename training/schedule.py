"""The learning rate: a linear warm-up, then a cosine to zero, counted in iterations as mmengine counts them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """`warmup` iterations from `start` of the peak up to it, then a cosine to 0 over the rest of `iterations`.

    In closed form what mmengine 0.10's LinearLR and CosineAnnealingLR compute step by step, their corner included: a
    warm-up of one iteration ends at `start`, not at the peak, since the cosine goes on from where it is.
    """

    lr: float
    iterations: int
    warmup: int
    start: float

    def at(self, iteration: int) -> float:
        """The rate of an iteration, the first being 0."""
        iteration = min(iteration, self.iterations - 1)
        if iteration < self.warmup:
            share = iteration / (self.warmup - 1) if self.warmup > 1 else 0.0
            return self.lr * (self.start + (1 - self.start) * share)
        peak = self.lr * self.start if self.warmup == 1 else self.lr
        return peak * (1 + math.cos(math.pi * (iteration - self.warmup) / (self.iterations - self.warmup))) / 2

    def state(self, iteration: int) -> list[dict[str, Any]]:
        """What mmengine's two schedulers hold after so many iterations, for the checkpoint."""
        common = {"param_name": "lr", "by_epoch": False, "base_values": [self.lr], "_global_step": iteration}
        common["verbose"] = False
        warm, rest = self.warmup, self.iterations - self.warmup
        found = []
        if warm:
            before = self.at(iteration) if iteration < warm else self.at(iteration - 1)
            found.append(
                {
                    "start_factor": self.start,
                    "end_factor": 1.0,
                    "total_iters": warm - 1,
                    "begin": 0,
                    "end": warm,
                    "last_step": min(iteration, warm - 1),
                    "_last_value": [before],
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
                "_last_value": [self.at(iteration)],
                **common,
            }
        )
        return found
