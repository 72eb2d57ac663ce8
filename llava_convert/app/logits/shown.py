"""What a model makes of a probe, whatever computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, Protocol

from llava_convert.app.ask.runtimes import Answer
from llava_convert.app.logits.probes import Probe
from llava_convert.core.values import dataclass

ANSWER = 24  # tokens
OURS = "this package"
PICTURE = -1  # what stands for a picture among ids

PIXELS, FEATURES, PROJECTOR = "pixels", "features", "projector"
EMBEDDINGS = "language_model.embeddings"


@dataclass(frozen=True)
class Shown:
    """What was computed, site by site in the order of the computation: float tensors on a CPU.

    `prompt` are the ids, `PICTURE` for each picture, None where the runtime tells their number alone, which is
    `length`, a picture counted by its rows. `logits` is (positions, vocabulary): of the prompt, or, where the runtime
    shows those of its answer alone, of the positions that its ids were chosen at; NaN where it does not tell them.
    """

    length: int
    logits: Any
    answer: Answer
    prompt: tuple[int, ...] | None = None
    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)


class Shows(Protocol):
    """A loaded model that can be looked into. `blind` says what it cannot show, empty where it shows all."""

    @property
    def name(self) -> str: ...

    @property
    def blind(self) -> str: ...

    @property
    def answers_only(self) -> bool:
        """Whether its logits are those of its answer's positions, not of the prompt's."""
        ...

    def show(self, probe: Probe, rendered: str, then: Sequence[int] = ()) -> Shown:
        """What it makes of a probe; `rendered` is the text of it by the source's template.

        `then` are ids behind the prompt whose logits are wanted as well; a runtime that answers only gets none.
        """
        ...


def joined(chunks: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The ids before, between and after pictures, as one."""
    ids: list[int] = []
    for i, chunk in enumerate(chunks):
        ids += [PICTURE, *chunk] if i else chunk
    return tuple(ids)


def layers(prefix: str, hidden: Sequence[Any]) -> dict[str, Any]:
    """Hidden states by name, that of the embeddings first; those that a class does not tell are None."""
    names = (f"{prefix}.layers.{i - 1}" if i else f"{prefix}.embeddings" for i in range(len(hidden)))
    return {name: each for name, each in zip(names, hidden, strict=True) if each is not None}


def greedy(first: int, stops: Sequence[int], following: Callable[[list[int]], int]) -> tuple[int, ...]:
    """The answer that begins with an id; `following` finds the next one of those so far."""
    ids = [first]
    while len(ids) < ANSWER and ids[-1] not in stops:
        ids.append(following(ids))
    return tuple(ids)
