"""Dataclasses that cost little to make.

The standard decorator compiles six functions a class, and a command has two hundred classes, so that a tenth of a
second went by before anything was done. Here a class compiles its `__init__` alone and shares the rest. mypy sees the
standard one, and holds to `frozen`; at run time nothing is in the way of an assignment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:

    def dataclass(made: type | None = None, /, *, frozen=False, eq=True, repr=True, **others: bool) -> Any:
        """As `dataclasses.dataclass`."""

        def make(plain: type) -> type:
            if plain.__doc__ is None:
                plain.__doc__ = plain.__name__  # or the signature is looked up, to be written there
            made = dataclasses.dataclass(plain, eq=False, repr=False, **others)
            fields = dataclasses.fields(made)
            if repr and "__repr__" not in vars(plain):
                made.__repr__ = _repr
            if eq and "__eq__" not in vars(plain):
                made.__eq__ = _eq
                made._compared = _values(f.name for f in fields if f.compare)
                made.__hash__ = _hash if frozen else None
                made._hashed = _values(f.name for f in fields if (f.compare if f.hash is None else f.hash))
            return made

        return make if made is None else make(made)


def _values(names: Any) -> Callable[[Any], Any]:
    """What gets these attributes of an object, all at once."""
    names = tuple(names)
    return staticmethod(attrgetter(*names) if names else lambda _: ())


def _repr(self: Any) -> str:
    shown = (f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self) if f.repr)
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _eq(self: Any, other: Any) -> Any:
    if other.__class__ is not self.__class__:
        return NotImplemented
    return self._compared(self) == self._compared(other)


def _hash(self: Any) -> int:
    return hash(self._hashed(self))
