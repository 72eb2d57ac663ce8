"""Convert LLaVA checkpoints between every layout in use, exactly.

    import llava_convert

    report = llava_convert.convert("iter_39620.pth", to="official")
    llava_convert.inspect("iter_39620.pth").targets
    llava_convert.verify("iter_39620.pth", "iter_39620_official").same
    llava_convert.upload("iter_39620_official", "me/my-llava")

Errors are `llava_convert.ConvertError`: a subclass for each exit code of the command line.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llava_convert._version import __version__ as __version__

__all__ = [
    "ConvertError",
    "HubError",
    "InputError",
    "MismatchError",
    "OutputError",
    "UnsafeError",
    "UnsupportedError",
    "UsageError",
    "convert",
    "inspect",
    "upload",
    "verify",
]

if TYPE_CHECKING:
    from llava_convert.api import convert, inspect, upload, verify
    from llava_convert.core.errors import (
        ConvertError,
        HubError,
        InputError,
        MismatchError,
        OutputError,
        UnsafeError,
        UnsupportedError,
        UsageError,
    )


def __getattr__(name: str) -> Any:
    # Late, so that `import llava_convert` and `--help` cost nothing.
    if name in __all__:
        module = "core.errors" if name.endswith("Error") else "api"
        return getattr(import_module(f"llava_convert.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
