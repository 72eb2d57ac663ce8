"""Messages of other packages that tell a user nothing."""

from __future__ import annotations

import logging
import warnings


def quiet_bitsandbytes() -> None:
    """Leave out what bitsandbytes logs when it is imported on a CPU.

    It asks for the package `kernels` where it could compute faster (bitsandbytes/backends/cpu/ops.py), whether anything
    is in 4 bits or not: peft and transformers import it wherever it is installed.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def quiet_peft() -> None:
    """Leave out that transformers renamed `is_gradient_checkpointing`, which peft 0.21 reads (peft_model.py)."""
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
