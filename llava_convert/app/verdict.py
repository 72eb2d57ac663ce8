"""What `verify` found, and how it says so."""

from __future__ import annotations

import math
import shlex
from dataclasses import field
from typing import Any

from llava_convert.app.logits.compare import Logits
from llava_convert.app.provenance import Provenance
from llava_convert.core.errors import MismatchError
from llava_convert.core.values import dataclass
from llava_convert.engine.compare import Difference
from llava_convert.layouts.info import LAYOUTS
from llava_convert.model.facts import spelled
from llava_convert.model.judgement import FactDifference
from llava_convert.model.tables.names import grouped

_SHOWN = 6  # facts in a message
_SHAPING = ("prompt_template", "chat_template", "stop", "image_processor", "pre")


@dataclass(frozen=True, repr=False)
class Verdict:
    """The result of `verify SOURCE OUT`; false if the models differ.

    Names of tensors are canonical; if OUT holds several files of one model, the file's name comes first.

    `equal` counts equal tensors; `quantised` of them equal SOURCE's quantisation, recomputed. `rounded` are merged
    tensors in which some elements differ only by the rounding of a merge in float32. `synthetic` are tensors that
    SOURCE's layout never has; they are not compared.

    `added_rows` are vocabulary rows that only OUT has, by tensor. They are compared with OUT's record;
    `unrecorded_rows` are not in the record, and are only checked for NaN.

    `facts` are settings of configs, tokenizer, processor and metadata that differ and change the answers. `harmless`
    keys differ without effect, each with the reason. `not_compared` are settings that one side does not store.
    `defects` are problems that programs would have with OUT. `logits` is the result of running both models, if asked.
    `alike` are equal facts, with both values, and `provenance` says where each side comes from: reports show them.
    """

    source: str
    out: str
    layouts: tuple[str, str]
    equal: int
    different: dict[str, Difference]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    added_rows: dict[str, int] = field(default_factory=dict)
    unrecorded_rows: dict[str, int] = field(default_factory=dict)
    facts: dict[str, FactDifference] = field(default_factory=dict)
    harmless: dict[str, str] = field(default_factory=dict)
    not_compared: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    defects: tuple[str, ...] = ()
    synthetic: tuple[str, ...] = ()
    quantised: int = 0
    rounded: dict[str, Difference] = field(default_factory=dict)
    logits: Logits | None = None
    alike: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    provenance: tuple[Provenance, Provenance] | None = None

    @property
    def same(self) -> bool:
        alike = not (self.different or self.missing or self.extra or self.facts or self.defects)
        return alike and (self.logits is None or self.logits.same)

    def __bool__(self) -> bool:
        return self.same

    def __repr__(self) -> str:
        counts = {"different": self.different, "missing": self.missing, "extra": self.extra}
        said = "".join(f", {word}={len(found)}" for word, found in counts.items())
        more = "".join(f", {word}={list(found)}" for word in ("facts", "defects") if (found := getattr(self, word)))
        return f"Verdict(same={self.same}, equal={self.equal}{said}{more})"

    def sentence(self) -> str:
        """The result for a model that is the same."""
        parts = [f"{self.equal - self.quantised} tensors equal bit for bit"] if self.equal > self.quantised else []
        if self.quantised:
            parts.append(f"{self.quantised} equal the quantisation of the source, recomputed")
        if self.rounded:
            count = sum(difference.elements for difference in self.rounded.values())
            parts.append(
                f"{len(self.rounded)} except {count} elements, which a LoRA merge in float32 rounds differently"
            )
        said = f"the same: {', '.join(parts) or 'no tensor'}; configs, tokenizer and processor agree"
        rows = max(self.added_rows.values(), default=0)
        unknown = max(self.unrecorded_rows.values(), default=0)
        if rows and not unknown:
            said += f"; {rows} added rows match the record"
        elif unknown:
            said += f"; plus {unknown} unrecorded rows of the vocabulary, which are not compared"
        return said if self.logits is None else f"{said}; {self.logits.sentence()}"

    def refuse(self, *, strict: bool = False) -> None:
        """Raise MismatchError (exit 7) unless all is equal; `strict`: and every row of OUT's vocabulary is known."""
        if self.same:
            if strict and self.unrecorded_rows:
                raise MismatchError(
                    f"{self.out} is not {self.source} alone: {self.sentence()}",
                    hint="leave --strict out, if another converter may have added rows",
                )
            return
        said = [f"{len(self.different)} tensors differ: {grouped(self.different)}"] if self.different else []
        if self.different:
            shaped = {name: d.shapes for name, d in self.different.items() if d.shapes is not None}
            gaps = [d.largest for d in self.different.values() if not math.isnan(d.largest) and d.shapes is None]
            said[0] += f" (largest difference {max(gaps):.3g})" if gaps else ""
            for name, (mine, theirs) in list(shaped.items())[:3]:
                said.append(f"{name} is {list(mine)} in the source, {list(theirs)} in OUT")
        if self.missing:
            said.append(f"{len(self.missing)} are missing: {grouped(self.missing)}")
        if self.extra:
            said.append(f"{len(self.extra)} are not in the source: {grouped(self.extra)}")
        said += [f"{name} is {spelled(d.source)} in the source, {spelled(d.out)} in OUT" for name, d in self._shown()]
        if len(self.facts) > _SHOWN:
            said.append(f"and {len(self.facts) - _SHOWN} more facts differ (--json lists them)")
        if self.logits is not None and not self.logits.same:
            said.append(self.logits.sentence())
        if said:
            raise MismatchError(
                f"{self.out} is not {self.source}: " + "; ".join([*said, *self.defects]), hint=self._next()
            )
        raise MismatchError(
            f"{self.out} holds the weights of {self.source}, but: " + "; ".join(self.defects), hint=self._next()
        )

    def _next(self) -> str:
        """What to do about a difference: another output, where this layout is one, else a look at both."""
        look = "--report FILE.html shows both side by side"
        if LAYOUTS[self.layouts[1]].target is None:
            return look
        again = shlex.join(["llava-convert", "convert", self.source, "--to", self.layouts[1], "-o", "NEW"])
        return f"`{again}` makes another one; {look}"

    def _shown(self) -> list[tuple[str, FactDifference]]:
        return list(self.facts.items())[:_SHOWN]

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "layout": self.layouts[0],
            "out": self.out,
            "to": self.layouts[1],
            "same": self.same,
            "equal": self.equal,
            "different": {name: d.as_json() for name, d in sorted(self.different.items())},
            "rounded": {name: d.as_json() for name, d in sorted(self.rounded.items())},
            "missing": list(self.missing),
            "extra": list(self.extra),
            "added_rows": self.added_rows,
            "unrecorded_rows": self.unrecorded_rows,
            "facts": {name: {"source": d.source, "out": d.out} for name, d in sorted(self.facts.items())},
            "harmless": dict(sorted(self.harmless.items())),
            "not_compared": list(self.not_compared),
            "warnings": list(self.notes),
            "defects": list(self.defects),
            "synthetic": list(self.synthetic),
            "quantised": self.quantised,
            "logits": None if self.logits is None else self.logits.as_json(),
        }
