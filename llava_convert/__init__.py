"""Convert LLaVA checkpoints from any layout to any other, exactly.

    import llava_convert

    llava_convert.plan("iter_39620.pth", to="official").files
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
    "Diagnosis",
    "HubError",
    "InputError",
    "Inspection",
    "MMBenchResult",
    "MismatchError",
    "OutputError",
    "PartFound",
    "Published",
    "ReleaseItem",
    "Reply",
    "Report",
    "Reporter",
    "SweepItem",
    "UnsafeError",
    "UnsupportedError",
    "UsageError",
    "Verdict",
    "chat",
    "convert",
    "doctor",
    "inspect",
    "merge",
    "mmbench",
    "plan",
    "release",
    "sweep",
    "upload",
    "verify",
]

if TYPE_CHECKING:
    from llava_convert.api import chat, convert, doctor, inspect, merge, mmbench, plan, release, sweep, upload, verify
    from llava_convert.app.ask.chat import Reply
    from llava_convert.app.doctor.run import Diagnosis
    from llava_convert.app.inspect import Inspection, PartFound
    from llava_convert.app.mmbench.run import MMBenchResult
    from llava_convert.app.publish.release import ReleaseItem
    from llava_convert.app.sweep import SweepItem
    from llava_convert.app.verdict import Verdict
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
    from llava_convert.core.progress import Reporter
    from llava_convert.engine.report import Published, Report

_HOMES = {
    "Diagnosis": "app.doctor.run",
    "Inspection": "app.inspect",
    "MMBenchResult": "app.mmbench.run",
    "PartFound": "app.inspect",
    "Published": "engine.report",
    "ReleaseItem": "app.publish.release",
    "Reply": "app.ask.chat",
    "Report": "engine.report",
    "Reporter": "core.progress",
    "SweepItem": "app.sweep",
    "Verdict": "app.verify",
}


def __getattr__(name: str) -> Any:
    # Late, so that `import llava_convert` and `--help` cost nothing.
    if name in __all__:
        home = "core.errors" if name.endswith("Error") else _HOMES.get(name, "api")
        return getattr(import_module(f"llava_convert.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
