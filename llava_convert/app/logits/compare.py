"""Two models in memory, shown the same: how far they are apart after each layer, and what they say.

The sites lie in the order of the computation, so that the first one beyond the bound is where the two part.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import field
from typing import TYPE_CHECKING, Any

from llava_convert.app.logits.loading import reasoned
from llava_convert.app.logits.probes import PROBES, Probe
from llava_convert.app.logits.shown import FEATURES, OURS, PIXELS, PROJECTOR, Shown, Shows
from llava_convert.core.values import dataclass

if TYPE_CHECKING:
    from llava_convert.app.logits.by_parts import ByParts

# The largest difference that rounding explains, as a share of the largest value at a site, by the narrower dtype of the
# two sides: 16 roundings of a 16-bit dtype (2^-11, 2^-8), and of float32 what sums in another order make; of q8_0 four
# times what was measured. Around SmolLM2-135M, of 30 layers (tests/interop/test_verify_bounds.py), copies in float16
# differ by 0.0021 as hf and by 0.0022 as GGUF, in bfloat16 by 0.014 and 0.0072, in q8_0 by 0.059; in llama.cpp itself,
# the text alone, by 0.0016, 0.0093 and 0.043. On the tiny model a float32 copy differs by 0, a float16 copy by 0.0012.
# No model of billions of weights was measured.
BOUNDS = {"float32": 2e-5, "float16": 8e-3, "bfloat16": 6e-2, "q8_0": 0.25}
# Of blocks of fewer bits: on the same model 0.30 in q4_k_m, 0.37 in q5_k_m and 0.63 in q4_0, so that logits tell gross
# faults alone. Their weights are compared with the quantisation of the source, bit for bit.
_COARSE = 1.0

PROMPT, LOGITS = "prompt", "logits"


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
    """What the comparison found. `runtime` computed the second model, and does not show what is `not_shown`."""

    dtype: str
    bound: float
    sites: tuple[Site, ...]
    said: tuple[Said, ...]
    runtime: str = OURS
    not_shown: str = ""

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
            if site.name == PIXELS and self.runtime != OURS:
                words += "; a processor that crops what training padded is replaced by --image-processor llava"
        if self.runtime != OURS:
            words += f"; OUT by {self.runtime}" + (f", which does not show {self.not_shown}" if self.not_shown else "")
        return words

    def as_json(self) -> dict[str, Any]:
        return {
            "same": self.same,
            "dtype": self.dtype,
            "bound": self.bound,
            "runtime": self.runtime,
            "not_shown": self.not_shown,
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
            mine, theirs = mine.cpu().double(), theirs.cpu().double()
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


def bound_of(dtype: str) -> float:
    """What rounding to a dtype explains, or to a block type of ggml in lower case."""
    return BOUNDS.get(dtype, _COARSE)


def coarser(one: str, other: str) -> str:
    """Of two dtypes the one whose bound is wider."""
    return max(one, other, key=bound_of)


def compare_models(mine: ByParts, theirs: Shows, dtype: str) -> Logits:
    """Show both models every probe. `dtype` is the narrower one that the two hold their weights in."""
    sites = _Sites()
    said = tuple(_compare_one(probe, mine, theirs, sites) for probe in PROBES)
    return Logits(dtype, bound_of(dtype), sites.all(), said, theirs.name, theirs.blind)


def _compare_one(probe: Probe, mine: ByParts, theirs: Shows, sites: _Sites) -> Said:
    import torch

    # Each goes on with what it made itself: the first site that differs is then the place of the fault.
    with nullcontext() if theirs.name == OURS else reasoned(theirs.name, "compute", probe.name):
        out = theirs.show(probe, mine.runtime.words.rendered(probe.messages))
    ours = mine.show(probe, "", out.answer.ids[:-1] if theirs.answers_only else ())
    for one, other in ((ours.prompt, out.prompt), ((ours.length,), (out.length,))):
        if one is not None and other is not None:
            sites.add(PROMPT, torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64), 0)
    _add_common(sites, ours.vision, out.vision, 1)
    _add_common(sites, ours.text, out.text, 1000)
    if out.text and (lacks := abs(len(ours.text) - len(out.text))) and out.text.keys() > {next(iter(ours.text))}:
        sites.add("language_model.layers", torch.zeros(lacks), torch.zeros(0), 1999)
    kind = f"{LOGITS} of {'pictures' if probe.pictures else 'text'}" if theirs.answers_only else LOGITS
    kl, top1 = _add_logits(sites, ours, out, kind)
    first, second = (_unstopped(answer.ids, mine.runtime.words.stop_ids) for answer in (ours.answer, out.answer))
    length = min(len(first), len(second))
    parts_at = next((i for i in range(length) if first[i] != second[i]), None if len(first) == len(second) else length)
    return Said(probe.name, ours.answer.text, out.answer.text, kl, top1, parts_at)


def _unstopped(ids: tuple[int, ...], stops: tuple[int, ...]) -> tuple[int, ...]:
    """An answer without the token that ends it, which some runtimes do not tell."""
    return ids[:-1] if ids and ids[-1] in stops else ids


def _add_common(sites: _Sites, mine: dict[str, Any], theirs: dict[str, Any], place: int) -> None:
    """Compare the sites that both have: of towers that are read at different layers, the common ones."""
    for i, (name, tensor) in enumerate(mine.items()):
        if name in theirs:
            sites.add(name, tensor, theirs[name], {FEATURES: 900, PROJECTOR: 901}.get(name, place + i))


def _add_logits(sites: _Sites, mine: Shown, theirs: Shown, site: str) -> tuple[float, float]:
    """Compare the logits: mean divergence in nats, share of equal first choices.

    Where a runtime tells logarithms of probabilities, of the likeliest tokens, both are taken less their mean over
    these; the others count as one for the divergence.
    """
    import torch

    if not len(theirs.logits):
        return float("nan"), 0.0
    rows = min(mine.logits.shape[-1], theirs.logits.shape[-1])
    ours, out = (each.logits[:, :rows].cpu().double() for each in (mine, theirs))
    if site == LOGITS:
        sites.add(LOGITS, ours, out, 2000)
        if ours.shape != out.shape:
            return float("nan"), 0.0
        return _divergence(ours, out), float((ours.argmax(-1) == out.argmax(-1)).double().mean())
    ours = ours[-len(out) :]
    told = ~out.isnan()
    gaps, scales, found = [], [], []
    for one, other, known in zip(ours, out, told, strict=True):
        a, b = one[known], other[known]
        gaps.append(a - a.mean() - b + b.mean())
        scales.append(a - a.mean())
        p = torch.log_softmax(one, -1)[known]
        rest = [torch.log1p(-each.exp().sum().clamp(max=1 - 1e-12))[None] for each in (p, b)]
        found.append(torch.cat([p, rest[0]]).exp() @ (torch.cat([p, rest[0]]) - torch.cat([b, rest[1]])))
    ours, gap = torch.cat(scales), torch.cat(gaps)
    sites.add(site, ours, ours - gap, 2000 + site.endswith("pictures"))
    top = float(
        (mine.logits[-len(out) :, :rows].cpu().argmax(-1) == out.nan_to_num(-torch.inf).argmax(-1)).double().mean()
    )
    return max(0.0, float(torch.stack(found).mean())), top


def _divergence(ours: Any, out: Any) -> float:
    from torch.nn.functional import log_softmax

    p, q = log_softmax(ours, -1), log_softmax(out, -1)
    return max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))
