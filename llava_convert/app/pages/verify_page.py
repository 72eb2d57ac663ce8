"""`verify --report`: what was compared, errors by layer and kind, facts side by side, pictures with both answers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from llava_convert.app.pages.html import (
    bar,
    cards,
    counted,
    page,
    paragraph,
    picture,
    preformatted,
    section,
    table,
    text,
)
from llava_convert.app.pages.provenance_part import provenance_part
from llava_convert.model.facts import spelled

if TYPE_CHECKING:
    from llava_convert.app.logits.compare import Logits
    from llava_convert.app.provenance import Made
    from llava_convert.app.verdict import Verdict
    from llava_convert.engine.compare import Difference

_LAYER = re.compile(r"(?<=\.)(\d+)(?=\.)")


def verify_page(verdict: Verdict, made: Made | None = None) -> str:
    """The page of a verdict, and by what it was `made`."""
    kind, word = ("good", "the same") if verdict.same else ("bad", "not the same")
    return page(
        f"{verdict.source} and {verdict.out}",
        f'<p class="{kind}"><strong>{word}</strong></p>',
        section("What was compared", _compared(verdict)),
        section("Tensors that differ, by layer and kind", _tensors(verdict.different)),
        section("Tensors that are rounded differently", _tensors(verdict.rounded)),
        section("Missing, and not in the source", _names(verdict)),
        section("What a reader chokes on", *(paragraph(one, "bad") for one in verdict.defects)),
        *(_logits(verdict.logits) if verdict.logits is not None else ()),
        section("Not compared", *(paragraph(one, "soft") for one in verdict.not_compared)),
        section("Notes", *(paragraph(one, "soft") for one in verdict.notes)),
        section("Facts side by side", _facts(verdict)),
        _provenance(verdict, made) if made is not None else "",
    )


def _compared(verdict: Verdict) -> str:
    rows = [
        ("source", text(verdict.source), text(verdict.layouts[0])),
        ("output", text(verdict.out), text(verdict.layouts[1])),
    ]
    counts = [
        f"{counted(verdict.equal, 'tensor', 'tensors')} equal bit for bit",
        f"{len(verdict.different):,} different, {len(verdict.missing):,} missing, "
        f"{len(verdict.extra):,} not in the source",
        f"{counted(len(verdict.facts), 'fact', 'facts')} different",
    ]
    if verdict.quantised:
        counts.append(f"{verdict.quantised} of the equal ones are the source's quantisation, recomputed")
    if verdict.added_rows:
        counts.append(f"{max(verdict.added_rows.values())} rows of the vocabulary that the source does not have")
    return table(("side", "where", "layout"), rows) + "".join(paragraph(count) for count in counts)


def _tensors(found: Mapping[str, Difference]) -> str:
    """A line for each kind of tensor, with the layers in which it differs."""
    kinds: dict[str, list[tuple[int, Difference]]] = {}
    for name, gap in found.items():
        layer = _LAYER.search(name)
        kinds.setdefault(_LAYER.sub("N", name, count=1), []).append((int(layer[0]) if layer else -1, gap))
    largest = max((g.largest for every in kinds.values() for _, g in every if math.isfinite(g.largest)), default=0.0)
    return table(
        ("kind", "layers", "elements", "largest difference", "beside the largest of all"), _kinds(kinds, largest)
    )


def _kinds(kinds: Mapping[str, list[tuple[int, Difference]]], largest: float) -> Iterator[tuple[str, ...]]:
    for kind, every in sorted(kinds.items()):
        layers = ", ".join(str(layer) for layer, _ in sorted(every, key=lambda one: one[0]) if layer >= 0)
        gap = max((g.largest for _, g in every if math.isfinite(g.largest)), default=math.nan)
        shapes = next((g.shapes for _, g in every if g.shapes is not None), None)
        size = f"{gap:.3g}" if shapes is None else f"shapes {list(shapes[0])} and {list(shapes[1])}"
        share = gap / largest if largest and math.isfinite(gap) else 0.0
        yield text(kind), text(layers), f"{sum(g.elements for _, g in every):,}", text(size), bar(share, bad=True)


def _names(verdict: Verdict) -> str:
    rows = [(text(name), "missing") for name in verdict.missing] + [
        (text(n), "not in the source") for n in verdict.extra
    ]
    return table(("tensor", "how"), rows)


def _facts(verdict: Verdict) -> str:
    """Those that differ first; then those that are alike, and keys that decide nothing."""
    rows = [
        (f'<span class="bad">{text(name)}</span>', text(spelled(gap.source)), text(spelled(gap.out)))
        for name, gap in sorted(verdict.facts.items())
    ]
    rows += [
        (text(name), text(spelled(one)), text(spelled(other))) for name, (one, other) in sorted(verdict.alike.items())
    ]
    differ = counted(len(verdict.facts), "fact differs", "facts differ")
    said = paragraph(f"{differ}, {len(verdict.alike):,} are alike", "bad" if verdict.facts else "soft")
    made = table(("fact", "source", "output"), rows)
    reasons = [(text(name), text(reason)) for name, reason in verdict.harmless.items()]
    return (said + made if made else "") + table(("differs, and decides nothing", "because"), reasons)


def _provenance(verdict: Verdict, made: Made) -> str:
    source, out = verdict.provenance or (None, None)
    sides = {} if source is None or out is None else {"source": dict(source.rows()), "output": dict(out.rows(source))}
    return provenance_part(sides, made)


def _logits(found: Logits) -> tuple[str, ...]:
    from llava_convert.app.logits.probes import PROBES

    # Decades from a millionth to one, so that rounding and a fault are both seen.
    rows = [
        (
            text(site.name),
            f"{site.largest:.3g}",
            f"{site.relative:.2g}",
            bar(1 + math.log10(max(site.relative, 1e-6)) / 6, bad=site.relative > found.bound) if site.relative else "",
        )
        for site in found.sites
    ]
    probes = {probe.name: probe for probe in PROBES}
    shown = []
    for one in found.said:
        alike = one.parts_at is None
        state = "the same answer" if alike else f"the answers part at token {one.parts_at}"
        image = "".join(picture(each, one.probe) for each in probes[one.probe].pictures)
        shown.append(
            image + paragraph(probes[one.probe].text) + paragraph("both" if alike else "source", "label")
            + preformatted(one.source) + ("" if alike else paragraph("output", "label") + preformatted(one.out))
            + paragraph(f"{state}; KL {one.kl:.2g}, first choices {one.top1:.1%} equal", "good" if alike else "bad")
        )  # fmt: skip
    kind = "good" if found.same else "bad"
    scale = f"Shares of the largest value at a site; {found.dtype} explains {found.bound:.2g}. Bars are by decades."
    return (
        section(
            "How far apart, layer by layer",
            paragraph(found.sentence(), kind),
            paragraph(scale, "soft"),
            table(("site", "largest difference", "share", "share, by decades from 1e-6 to 1"), rows),
        ),
        section("What both say", cards(shown)),
    )
