"""Directories that the real DeepSpeed 0.14.4 wrote, against what its own zero_to_fp32 makes of them.

`.venvs/xtuner/bin/python tests/peers/zero_cases.py` makes them, in a minute.
"""

from __future__ import annotations

import pytest
import torch

from llava_convert.storage.zero.checkpoint import read_zero
from tests.conftest import CHECKOUT

pytestmark = pytest.mark.peers

CASES = CHECKOUT / ".venvs" / "cases-zero"
NAMES = (
    "zero1_ranks2",
    "zero1_ranks3_groups",
    "zero1_ranks3_frozen",
    "zero2_ranks1",
    "zero2_ranks3",
    "zero2_ranks3_groups_frozen",
    "zero2_ranks5",
    "zero2_ranks3_round_robin",
    "zero2_ranks3_fp16",
    "zero3_ranks1_frozen",
    "zero3_ranks3",
    "zero3_ranks3_groups_frozen",
    "zero3_ranks5_frozen_sub_groups",
)
BUFFERS = {"positions", "shift"}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


@pytest.mark.parametrize("through", ["iter_2.pth", "."])
@pytest.mark.parametrize("name", NAMES)
def test_same_weights(name: str, through: str) -> None:
    """Bit for bit, whether the save or the folder with `latest` is given."""
    folder = CASES / name
    if not (folder / "masters.pt").is_file():
        pytest.skip("not made: .venvs/xtuner/bin/python tests/peers/zero_cases.py")
    if through == "." and not (folder / "latest").is_file():
        pytest.fail("DeepSpeed writes `latest` unless told otherwise")
    found = read_zero(folder / through)
    wanted = torch.load(folder / "masters.pt", weights_only=True)
    half = torch.float16 if name.endswith("fp16") else torch.bfloat16
    frozen = {"base.weight", "base.bias"} if "frozen" in name else set()
    # zero_to_fp32 forgets the frozen weights of ZeRO-1, which are in the module all the same.
    assert found.tensors.keys() == wanted.keys() | frozen
    assert found.tensors.keys() - wanted.keys() == (frozen if name.startswith("zero1") else set())
    assert (str(found.stage), str(found.ranks)) == (name[4], name.partition("ranks")[2][0])
    assert found.meta == {"iter": 2} and not found.warnings
    for key, stored in found.tensors.items():
        data = b""
        for extent in stored.extents:
            with extent.path.open("rb") as stream:
                stream.seek(extent.offset)
                data += stream.read(extent.length)
        tensor = torch.frombuffer(bytearray(data), dtype=DTYPES[stored.dtype]).reshape(stored.shape)
        kept = half if key in frozen | BUFFERS - {"positions"} else torch.int64 if key == "positions" else torch.float32
        assert tensor.dtype == kept, key
        if key in wanted:
            assert torch.equal(tensor.to(wanted[key].dtype), wanted[key]), key
    assert found.tensors["head.weight"].extents == found.tensors["embed.weight"].extents
