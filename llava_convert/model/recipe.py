"""A model made whole: every tensor with where it comes from and what happens to it on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Any

from llava_convert.core.errors import UnsupportedError
from llava_convert.core.tensors import QUANTS, StoredTensor
from llava_convert.core.values import dataclass
from llava_convert.model.bases import Base
from llava_convert.model.checkpoint import LLM, PROJECTOR, VISION, Checkpoint, Dropped
from llava_convert.model.configs import family
from llava_convert.model.facts import BIAS, CLASS_TOKEN, DEPTH, NEWLINE
from llava_convert.model.projector import projector_config
from llava_convert.ops.base import Op
from llava_convert.ops.cast import Cast
from llava_convert.ops.join import Chain, Join, Part, alike, joined, on_rows, shares
from llava_convert.storage.sidecars import Sidecars


@dataclass(frozen=True)
class Bases:
    """What the user says of the base models; overrides what the source names.

    `cache`: what a hub holds is downloaded to its client's cache, instead of being read in place. `given` are those of
    the asked ones that were opened already, since they are parts of whole LLaVAs.
    """

    llm: str | None = None
    visual_encoder: str | None = None
    llm_id: str | None = None
    visual_encoder_id: str | None = None
    lora_alpha: Mapping[str, float] = field(default_factory=dict)
    cache: bool = False
    given: Mapping[str, Base] = field(default_factory=dict)

    def asked(self, part: str) -> str | None:
        return {LLM: self.llm, VISION: self.visual_encoder}.get(part)

    def asked_id(self, part: str) -> str | None:
        return {LLM: self.llm_id, VISION: self.visual_encoder_id}.get(part)


@dataclass(frozen=True)
class Recipe:
    """One canonical tensor: the stored tensor it starts from, and the ops on the way.

    Where the last op is a join, it is a tree: each of its `members` starts from a stored tensor of its own.
    """

    tensor: StoredTensor
    ops: tuple[Op, ...] = ()
    origin: str = "checkpoint"

    def then(self, *ops: Op) -> Recipe:
        """The recipe with further ops; one that only undoes the op before it goes, and takes that op with it."""
        found = self
        for op in ops:
            if len(found.members) > 1:
                found = found._each(op)
                continue
            before = replace(found, ops=found.ops[:-1])
            undone = bool(found.ops) and op == found.ops[-1].inverse(before.dtype, before.shape)
            found = before if undone else replace(found, ops=(*found.ops, op))
        return found

    @property
    def members(self) -> tuple[Recipe, ...]:
        """The recipes that are joined; itself where nothing is."""
        if not self.ops or not isinstance(join := self.ops[-1], Join):
            return (self,)
        first = replace(self, ops=self.ops[:-1])
        return (first, *(replace(self, tensor=one.tensor, ops=one.ops) for one in join.others))

    def _each(self, op: Op) -> Recipe:
        """The join with the op done to each member."""
        join = self.ops[-1]
        assert isinstance(join, Join)
        local = [on_rows(op, part) for part in join.parts]
        if None in local:
            raise UnsupportedError(f"{op.name} is not supported for joined tensors")
        return joined_recipe([m.then(one) for m, one in zip(self.members, local, strict=True) if one], join.groups)

    def part(self, part: Part) -> Recipe:
        """The recipe of one of several tensors that are joined in this one.

        Taken out before the ops where these leave rows apart: a copy of the whole then is copies of its parts, and a
        LoRA is split by the rows of B. Of what was joined of just those parts it is the member itself.
        """
        part.result(self.dtype, self.shape)
        if len(self.members) > 1:
            join = self.ops[-1]
            assert isinstance(join, Join)
            if part not in join.parts:
                raise UnsupportedError("joined tensors can only be split in the same way as they were joined")
            return self.members[join.parts.index(part)]
        stored = part.stored(self.tensor)
        local = [on_rows(op, part) for op in self.ops]
        if stored is None or None in local:
            return self.then(part)
        return replace(self, tensor=stored, ops=tuple(op for op in local if op is not None))

    @property
    def dtype(self) -> str:
        return self._result()[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self._result()[1]

    def _result(self) -> tuple[str, tuple[int, ...]]:
        dtype, shape = self.tensor.dtype, self.tensor.shape
        for op in self.ops:
            dtype, shape = op.result(dtype, shape)
        return dtype, shape


def joined_recipe(members: Sequence[Recipe], groups: int) -> Recipe:
    """The recipe of tensors joined by rows: in each of `groups` groups a share of every member in turn.

    Members that are copied, or all treated alike, are joined where their bytes lie, so that the whole is too. Raises
    UnsupportedError (exit 4) for quantised members of several types and where rows do not make up the groups.
    """
    members = _of_one_dtype(members)
    rows = [shares(member.shape[0], groups, (1,))[0] for member in members]
    if len({member.shape[1:] for member in members}) > 1:
        raise UnsupportedError(f"cannot join rows of different lengths: {[list(member.shape) for member in members]}")
    ops = members[0].ops
    if alike(ops) and all(member.ops == ops and member.tensor.dtype == members[0].tensor.dtype for member in members):
        stored = joined([member.tensor for member in members], groups)
        if stored is not None:
            return replace(members[0], tensor=stored)
    join = Join(groups, tuple(rows), tuple(Chain(member.tensor, member.ops) for member in members[1:]))
    return replace(members[0], ops=(*ops, join))


def _of_one_dtype(members: Sequence[Recipe]) -> Sequence[Recipe]:
    """Floats of several types widened to the widest, exactly."""
    dtypes = {member.dtype for member in members}
    if len(dtypes) == 1:
        return members
    if dtypes & QUANTS.keys():
        raise UnsupportedError(
            f"cannot join weights of different types: {', '.join(sorted(dtypes))}",
            hint="--dequantize turns them into floats, which keep the quantisation error",
        )
    widest = "F64" if "F64" in dtypes else "F32"
    return [member if member.dtype == widest else member.then(Cast(widest)) for member in members]


@dataclass(frozen=True)
class Model:
    """A checkpoint made whole, as far as a target asked for it.

    `recipes` holds the merged weights of each wanted part in module order; `configs` and `bases` are by part. `tied`
    says that the language model's head shares the embedding's weights. `added` is what an earlier conversion recorded
    as added to the vocabulary, while it has been taken off again. `vocabulary` says how rows and tokens that differed
    were made to agree.
    """

    checkpoint: Checkpoint
    recipes: Mapping[str, Recipe]
    configs: Mapping[str, dict[str, Any]]
    bases: Mapping[str, Base]
    tied: bool
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    dropped: tuple[Dropped, ...]
    added: Mapping[str, Any] | None = None
    vocabulary: str = ""

    @property
    def facts(self) -> dict[str, Any]:
        """The facts of mappings/facts/llava.toml that the source states, by name, and what its tensors say."""
        found = {**self.checkpoint.settings.facts, NEWLINE: self.checkpoint.image_newline is not None}
        if VISION in self.configs:
            found[CLASS_TOKEN] = family(VISION, self.configs[VISION]).class_token
        projector = {name: recipe.tensor for name, recipe in self.part(PROJECTOR).items()}
        if projector:
            sizes = projector_config(projector)
            found |= {DEPTH: sizes["depth"], BIAS: sizes["bias"]}  # `check_projector` saw that the config agrees
        return found

    @property
    def embedding(self) -> str:
        """The canonical name of the language model's embedding."""
        return family(LLM, self.configs[LLM]).embedding

    @property
    def head(self) -> str:
        """The canonical name of the language model's head."""
        return family(LLM, self.configs[LLM]).head

    def part(self, name: str) -> dict[str, Recipe]:
        """The recipes of one part, by canonical name."""
        return {k: v for k, v in self.recipes.items() if k.startswith(f"{name}.")}

    def files(self, part: str) -> Sidecars | None:
        """The files beside the part's weights: tokenizer, processor, generation config."""
        own = self.checkpoint.parts[part].files
        if own is not None:
            return own
        return self.bases[part].files if part in self.bases else None
