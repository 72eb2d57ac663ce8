"""Modules that are imported at their first use: a conversion that copies bytes needs no NumPy, which costs 0.1 s."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Later(ModuleType):
    """A module's name. The first attribute that is asked of it imports the module, and brings all the others."""

    def __getattr__(self, name: str) -> Any:
        module = import_module(self.__name__)
        self.__dict__.update(vars(module))
        return getattr(module, name)


if TYPE_CHECKING:
    import numpy as numpy  # a name that other modules may import
else:
    numpy = _Later("numpy")
