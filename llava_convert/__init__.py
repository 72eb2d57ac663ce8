"""Convert LLaVA checkpoints between every layout in use, exactly.

    import llava_convert

    report = llava_convert.convert("iter_39620.pth", to="official")
    llava_convert.inspect("iter_39620.pth").targets
    llava_convert.verify("iter_39620.pth", "iter_39620_official", check=True)
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
    "Inspection",
    "MismatchError",
    "OutputError",
    "Published",
    "ReleaseItem",
    "Report",
    "Reporter",
    "UnsafeError",
    "UnsupportedError",
    "UsageError",
    "Verdict",
    "convert",
    "inspect",
    "plan",
    "release",
    "upload",
    "verify",
]
_TYPES = ("Inspection", "Published", "ReleaseItem", "Report", "Reporter", "Verdict")

if TYPE_CHECKING:
    from llava_convert.api import (
        Inspection,
        Published,
        ReleaseItem,
        Report,
        Reporter,
        Verdict,
        convert,
        inspect,
        plan,
        release,
        upload,
        verify,
    )
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
    if name.endswith("Error") and name in __all__:
        return getattr(import_module("llava_convert.core.errors"), name)
    if name in __all__:
        api = import_module("llava_convert.api")
        found = getattr(api, name)
        return found if name in _TYPES else api.of_python(found)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
