"""`llava-convert` with FSDP2 on processes without a GPU, for tests: accelerate 1.15 does not offer that.

Its AcceleratorState turns to FSDP for GPUs and their kin alone, and its plugin for FSDP1 asks for a device. torch
itself shards on a CPU, so accelerate is told that gloo's processes are GPUs whose device is the CPU.
"""

from __future__ import annotations

import os
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

# What `accelerate launch` makes of a config file.
os.environ.update(
    ACCELERATE_USE_FSDP="true",
    ACCELERATE_TORCH_DEVICE="cpu",
    FSDP_VERSION="2",
    FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer,CLIPEncoderLayer",
    FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
    FSDP_RESHARD_AFTER_FORWARD="true",
)
PartialState._prepare_backend = lambda self, cpu=False, sagemaker_dp=False, backend=None: (
    "gloo",
    DistributedType.MULTI_GPU,
)
torch.distributed.init_process_group("gloo")

from llava_convert.cli import main  # noqa: E402

sys.exit(main())
