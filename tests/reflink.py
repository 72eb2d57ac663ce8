"""File systems whose files can share blocks: XFS and btrfs in an image, for as long as a test takes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# By kind: how one is made in an image, and the package of Debian's that has the program.
MAKE = {"xfs": (["mkfs.xfs", "-q", "-m", "reflink=1"], "xfsprogs"), "btrfs": (["mkfs.btrfs", "-q"], "btrfs-progs")}


@contextmanager
def sharing(kind: str, folder: Path, size: int) -> Iterator[Path]:
    """Where it is mounted. The test is skipped where it cannot be made or mounted; what is left out is said then."""
    make, package = MAKE[kind]
    if shutil.which(make[0]) is None:
        pytest.skip(f"{make[0]} is not installed (Debian: {package})")
    if os.geteuid() != 0:
        pytest.skip("mounting an image needs root")
    image, mount = folder / "image", folder / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run([*make, str(image)], check=True, capture_output=True)
    mounted = subprocess.run(["mount", "-o", "loop", str(image), str(mount)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"the image cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)
        image.unlink()
