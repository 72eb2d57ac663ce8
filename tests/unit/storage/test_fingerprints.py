"""Digests of whole files, and which of them still hold."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from llava_convert.core.errors import InputError
from llava_convert.storage.fingerprints import Digest, digests
from llava_convert.storage.hubs import Destination, Parcel
from llava_convert.storage.output.staging import Staging
from llava_convert.storage.ranges import write_all

TEXT, OTHER = b"one and a half", b"two and a half"


def staged(out: Path, *, sha256: bool) -> dict[str, Digest]:
    with Staging(out, "plan", force=False, resume=False, needed_bytes=0, say=[].append, sha256=sha256) as stage:
        with stage.new_file("sub/a.bin", len(TEXT)) as fd:
            write_all(fd, 0, TEXT)
        stage.write_bytes("b.json", b"{}")
        found = stage.digests(["sub/a.bin", "b.json"])
        stage.commit()
    return found


@pytest.mark.parametrize("sha256", [True, False])
def test_those_of_an_output_hold_where_it_is_put(tmp_path: Path, sha256: bool) -> None:
    found = staged(tmp_path / "out", sha256=sha256)
    assert found["sub/a.bin"].as_json() == {"size": len(TEXT), "sha256": hashlib.sha256(TEXT).hexdigest()}
    assert found["b.json"].sha256 == hashlib.sha256(b"{}").hexdigest()
    assert all(digest.holds(tmp_path / "out" / name) for name, digest in found.items())


def rewritten(path: Path) -> None:
    path.write_bytes(OTHER)


def exchanged(path: Path) -> None:
    """Another file of the same size and time."""
    info = path.stat()
    path.with_suffix(".new").write_bytes(OTHER)
    os.utime(path.with_suffix(".new"), ns=(info.st_atime_ns, info.st_mtime_ns))
    path.with_suffix(".new").replace(path)


def grown(path: Path) -> None:
    info = path.stat()
    path.write_bytes(OTHER + b"s")
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


@pytest.mark.parametrize("change", [rewritten, exchanged, grown])
def test_a_file_that_changed_is_hashed_anew(tmp_path: Path, change: object) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(TEXT)
    os.utime(path, ns=(0, 0))
    known = digests(tmp_path, ["a.bin"])
    parcel = Parcel(tmp_path, known, Destination("me/model"))
    assert parcel.known("a.bin") == hashlib.sha256(TEXT).hexdigest()
    change(path)  # type: ignore[operator]
    assert digests(tmp_path, ["a.bin"], known)["a.bin"].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert parcel.known("a.bin") is None, "so that the hub's client hashes it"
    path.unlink()
    assert parcel.known("a.bin") is None


def test_one_that_is_known_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(TEXT)
    state = digests(tmp_path, ["a.bin"])["a.bin"].state
    known = {"a.bin": Digest("0" * 64, state)}
    assert digests(tmp_path, ["a.bin"], known) == known


def test_one_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        digests(tmp_path, ["a.bin"])
