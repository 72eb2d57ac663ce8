"""What lies beside the weights and tells of them, README.md and conversion.json, made before the first byte."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from llava_convert.app.card import CARD
from llava_convert.core.values import dataclass
from llava_convert.engine.plan import Plan
from llava_convert.engine.record import Record
from llava_convert.model.record import RECORD

# These stand for digests that only the run finds out, and are as long.
_XXH3_128, _SHA256 = "0" * 32, "0" * 64


@dataclass(frozen=True)
class Documents:
    """The two documents of an output, but for digests: an error in either comes before the weights.

    `digests` says that the record gets those of tensors, `vouches` those of the files that a full check has read.
    """

    plan: Plan
    card: bytes
    record: Record
    digests: bool
    vouches: bool

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """The size of each file by its name. Raises what encoding them raises."""
        digests = {(tensor.shard, tensor.name): _XXH3_128 for tensor in self.plan.tensors}
        files: dict[str, dict[str, str | int]] = {
            name: {"size": size, "sha256": _SHA256} for name, size in self.plan.sizes.items()
        }
        return {name: len(data) for name, data in self.completed(digests, files).items()}

    def completed(
        self, digests: Mapping[tuple[str, str], str], files: Mapping[str, Mapping[str, str | int]]
    ) -> dict[str, bytes]:
        """The files by name, with the digests that the run found of tensors and of files, where it had to find any."""
        record = self.record.dump(
            digests=digests if self.digests else None,
            files=files if self.vouches else None,
        )
        return {RECORD: record, CARD: self.card}
