"""Two models in memory, shown the same: how far they are apart after each layer, and what they say.

The sites lie in the order of the computation, so that the first one beyond the bound is where the two part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llava_convert.app.logits.probes import PROBES, Probe

if TYPE_CHECKING:
    from llava_convert.app.ask.transformers_runtime import TransformersRuntime

# The largest difference that rounding explains, as a share of the largest value at a site, by the narrower dtype of the
# two sides: 16 roundings of a 16-bit dtype (2^-11, 2^-8), and of float32 what sums in another order make. They are a
# judgement: no model of real size was measured. On the tiny one a float32 copy differs by 0, a float16 copy by 0.0012.
BOUNDS = {"float32": 2e-5, "float16": 8e-3, "bfloat16": 6e-2}
QUANTISED = 0.5
ANSWER = 24  # tokens

PROMPT, PIXELS, FEATURES, PROJECTOR, LOGITS = "prompt", "pixels", "features", "projector", "logits"


@dataclass(frozen=True)
class Site:
    """How far two models are apart at one place, over all probes; `relative` to the largest value there."""

    name: str
    largest: float
    relative: float


@dataclass(frozen=True)
class Said:
    """What both models said to a probe. `kl` is the mean divergence in nats, `top1` the share of equal first choices.

    `parts_at` is the first token of the greedy answers that differs, None where none does.
    """

    probe: str
    source: str
    out: str
    kl: float
    top1: float
    parts_at: int | None


@dataclass(frozen=True)
class Logits:
    """What the comparison found."""

    dtype: str
    bound: float
    sites: tuple[Site, ...]
    said: tuple[Said, ...]

    @property
    def parts(self) -> Site | None:
        """The first site at which rounding does not explain the difference."""
        return next((site for site in self.sites if not site.relative <= self.bound), None)

    @property
    def same(self) -> bool:
        return self.parts is None

    def sentence(self) -> str:
        last = self.sites[-1]
        equal = sum(one.parts_at is None for one in self.said)
        words = (
            f"logits differ by at most {last.largest:.3g} ({last.relative:.2g} of the largest; {self.dtype} explains "
            f"{self.bound:.2g}), KL {max(one.kl for one in self.said):.2g}, first choices "
            f"{min(one.top1 for one in self.said):.1%} equal, {equal} of {len(self.said)} answers equal"
        )
        if (site := self.parts) is not None:
            words = (
                f"the models part at {site.name} (by {site.largest:.3g}, {site.relative:.2g} of the largest); {words}"
            )
        return words

    def as_json(self) -> dict[str, Any]:
        return {
            "same": self.same,
            "dtype": self.dtype,
            "bound": self.bound,
            "parts_at": None if self.parts is None else self.parts.name,
            "sites": [
                {"name": s.name, "largest": _number(s.largest), "relative": _number(s.relative)} for s in self.sites
            ],
            "answers": [dict(one.__dict__) for one in self.said],
        }


def _number(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None


@dataclass
class _Sites:
    """The largest differences so far, by site, in the order in which they come."""

    largest: dict[str, float] = field(default_factory=dict)
    scale: dict[str, float] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, mine: Any, theirs: Any, place: int) -> None:
        self.order.setdefault(name, place)
        gap, scale = float("inf"), 0.0
        if mine.shape == theirs.shape:
            mine, theirs = mine.double(), theirs.double()
            gap, scale = float((mine - theirs).abs().max()), float(mine.abs().max())
            gap = float("inf") if gap != gap else gap
        self.largest[name] = max(self.largest.get(name, 0.0), gap)
        self.scale[name] = max(self.scale.get(name, 0.0), scale)

    def all(self) -> tuple[Site, ...]:
        names = sorted(self.largest, key=lambda name: self.order[name])
        return tuple(
            Site(n, self.largest[n], self.largest[n] / max(self.scale[n], 1e-30) if self.largest[n] else 0.0)
            for n in names
        )


def compare_models(mine: TransformersRuntime, theirs: TransformersRuntime, dtype: str) -> Logits:
    """Show both models every probe. `dtype` is the narrower one that the two hold their weights in."""
    import torch

    sites, said = _Sites(), []
    with torch.inference_mode():
        for probe in PROBES:
            said.append(_compare_one(probe, mine, theirs, sites))
    return Logits(dtype, BOUNDS.get(dtype, QUANTISED), sites.all(), tuple(said))


def _compare_one(probe: Probe, mine: TransformersRuntime, theirs: TransformersRuntime, sites: _Sites) -> Said:
    import torch
    from torch.nn.functional import log_softmax

    chunks, other = mine.words.chunks(probe.messages), theirs.words.chunks(probe.messages)
    flat = [torch.tensor([float(i) for chunk in ids for i in [*chunk, -1]]) for ids in (chunks, other)]
    sites.add(PROMPT, flat[0], flat[1], 0)
    # Each goes on with what it made itself: the first site that differs is then the place of the fault.
    seen: list[list[Any]] = [[], []]
    for picture in probe.pictures:
        made = [_vision(runtime, picture) for runtime in (mine, theirs)]
        _add_vision(sites, *made)
        for side in (0, 1):
            seen[side].append(made[side][-1][1])
    hidden = [_thought(runtime, chunks, rows) for runtime, rows in ((mine, seen[0]), (theirs, seen[1]))]
    for i, (ours, out) in enumerate(zip(*(h[0] for h in hidden), strict=False)):
        sites.add("language_model.embeddings" if i == 0 else f"language_model.layers.{i - 1}", ours, out, 1000 + i)
    if len(hidden[0][0]) != len(hidden[1][0]):
        sites.add("language_model.layers", torch.zeros(len(hidden[0][0])), torch.zeros(len(hidden[1][0])), 1999)
    logits = [h[1] for h in hidden]
    rows = min(one.shape[-1] for one in logits)
    ours, out = (one[0, :, :rows].float() for one in logits)
    sites.add(LOGITS, ours, out, 2000)
    kl, top1 = float("nan"), 0.0
    if ours.shape == out.shape:
        p, q = log_softmax(ours.double(), -1), log_softmax(out.double(), -1)
        kl = max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))
        top1 = float((ours.argmax(-1) == out.argmax(-1)).double().mean())
    answers = [runtime.answer(probe.messages, probe.pictures, limit=ANSWER) for runtime in (mine, theirs)]
    first, second = (answer.ids for answer in answers)
    length = min(len(first), len(second))
    parts_at = next((i for i in range(length) if first[i] != second[i]), None if len(first) == len(second) else length)
    return Said(probe.name, answers[0].text, answers[1].text, kl, top1, parts_at)


def _vision(runtime: TransformersRuntime, picture: Any) -> list[tuple[str, Any]]:
    """What comes of a picture, site by site, the rows for the language model last."""
    pixels = runtime.pixels(picture)
    hidden = runtime.hidden(pixels)
    features = runtime.selected(hidden)
    # What lies behind the layer that is read decides nothing, and some layouts leave it out.
    read = range(len(hidden))[runtime.layer] + 1
    layers = [
        (f"vision_tower.layers.{i - 1}" if i else "vision_tower.embeddings", h) for i, h in enumerate(hidden[:read])
    ]
    return [(PIXELS, pixels), *layers, (FEATURES, features), (PROJECTOR, runtime.projector(features))]


def _add_vision(sites: _Sites, mine: list[tuple[str, Any]], theirs: list[tuple[str, Any]]) -> None:
    """Compare the sites that both have: of towers that are read at different layers, the common ones."""
    out = dict(theirs)
    for i, (name, tensor) in enumerate(mine):
        if name in out:
            sites.add(name, tensor, out[name], {FEATURES: 900, PROJECTOR: 901}.get(name, 1 + i))


def _thought(runtime: TransformersRuntime, chunks: list[list[int]], rows: list[Any]) -> tuple[tuple[Any, ...], Any]:
    """Every hidden state of the language model, that of the embeddings first, and the logits."""
    made = runtime.llm(inputs_embeds=runtime.embedded(chunks, rows), output_hidden_states=True, use_cache=False)
    return made.hidden_states, made.logits
