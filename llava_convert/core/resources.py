"""Where the data that ships with the package lies, in a wheel and in a checkout."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).resolve().parents[1]


def data_dir(name: str) -> Path:
    """The folder `mappings` or `training`: inside the package in a wheel, beside it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def training(module: str) -> ModuleType:
    """A module of the training folder, as `llava_convert.training.<module>`.

    In a wheel the folder is a subpackage; in a checkout it lies beside the package and is made one here.
    """
    name = f"{_PACKAGE.name}.training"
    if name not in sys.modules:
        folder = data_dir("training")
        spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return import_module(f"{name}.{module}")
