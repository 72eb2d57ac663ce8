"""What places are called. A remote folder is read through placeholders in a temporary one; people know its address."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

_CALLED: dict[str, str] = {}


def call(place: Path, address: str) -> None:
    """From now on messages say `address` for the folder `place`."""
    _CALLED[str(place)] = address


def forget(place: Path) -> None:
    _CALLED.pop(str(place), None)


def called(text: object) -> str:
    """A path, or a text that holds paths, with every renamed folder by its address."""
    said = str(text)
    for place, address in _CALLED.items():
        said = said.replace(place, address)
    return said


def address_of(path: Path) -> Path | str:
    """A path, or the address of what lies elsewhere."""
    said = called(path)
    return path if said == str(path) else said


def name_of(path: Path) -> str:
    """The last part of what a path is called, without a hub's revision."""
    address = called(path)
    if address == str(path):
        return path.name or path.absolute().name
    return PurePosixPath(address).name.partition("@")[0]
