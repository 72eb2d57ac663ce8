"""bitsandbytes is imported without a word about a package that nobody asked for."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

QUIET = "from llava_convert.core.quiet import quiet_bitsandbytes; quiet_bitsandbytes()\n"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_bitsandbytes_is_quiet() -> None:
    code = QUIET + "import bitsandbytes"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "gemm_4bit_forward" not in found.stderr + found.stdout
